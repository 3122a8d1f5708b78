"""The optimizer's kernels compile for every target: no spills, 16-byte accesses where hinted."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import triton.language as tl

import csrc_triton
from alps_kernels.ops.adamw.op import WARPS
from alps_kernels.ops.adamw.tables import TILE, Tile
from csrc_triton.head_adamw import head_adamw_kernel, head_grad_norm_kernel

from ..support.mutants import edit
from .offline import TARGETS, build, count, resources, sass, spill_free

GROUPS = TILE // 8
TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "8bit": tl.int8}
TABLES = {"tiles_ptr": "*i64", "pointers_ptr": "*i64", "hypers_ptr": "*fp32", "control_ptr": "*fp32"}

# param, moments, master, amsgrad, weight_copy; the bytes an element that the kernel's docstring states
VARIANTS = [
    ("fp32", "fp32", None, False, False, 28),
    ("fp32", "fp32", None, True, False, 36),
    ("fp32", "bf16", None, False, False, 20),
    ("bf16", "fp32", None, False, False, 22),
    ("bf16", "fp32", None, False, True, 24),
    ("bf16", "fp32", "split", False, False, 26),
    ("bf16", "fp32", "split", False, True, 28),
    ("bf16", "fp32", "kahan", False, False, 26),
    ("bf16", "fp32", "stochastic", False, False, 22),
    ("bf16", "bf16", "split", False, False, 18),
    ("bf16", "bf16", "stochastic", True, False, 18),
    ("fp16", "fp32", "split", True, False, 34),
    ("fp16", "bf16", "stochastic", False, False, 14),
    ("bf16", "8bit", "split", False, False, 14.25),
    ("bf16", "8bit", "stochastic", False, True, 12.25),
    ("fp16", "8bit", "split", False, False, 14.25),
    ("fp32", "8bit", None, False, False, 16.25),
]


def compiled(target, param, moment, master, amsgrad, aligned, control=True, weight_copy=False,
             kernel=head_adamw_kernel):
    signature = {name: kind for name, kind in TABLES.items() if control or name != "control_ptr"}
    constants = {"PARAM": TYPES[param], "GRAD": TYPES[param], "MOMENT": TYPES[moment], "MASTER": master,
                 "AMSGRAD": amsgrad, "WEIGHT_COPY": weight_copy, "ALIGNED": aligned, "GROUPS": GROUPS}
    return build(kernel, signature, constants if control else {**constants, "control_ptr": None},
                 target=target, aligned=tuple(signature), num_warps=WARPS[aligned])


def moved(built):
    """(bytes of the data that a thread moves for its 8 elements, scalars of the tables it loads): from the IR.

    A tensor access is [128, 8] elements, or [128, 1] scales, 8 groups of which share one.
    """
    total, scalars = 0.0, 0
    for line in built.asm["ttir"].splitlines():
        if not (found := re.search(r"tt\.(load|store) .*: (tensor<(\d+)x(\d+)x)?!tt\.ptr<(\w+)>", line)):
            continue
        if found[2] is None:
            scalars += 1
            continue
        bits = int(re.search(r"\d+", found[5])[0])
        total += bits / 8 * (int(found[4]) if int(found[4]) == 8 else 1 / 8)
    return total, scalars


@pytest.mark.parametrize("param, moment, master, amsgrad, weight_copy, per_element", VARIANTS)
def test_head_adamw_moves_the_bytes_it_states_16_at_a_time_without_spills(param, moment, master, amsgrad, weight_copy,
                                                                          per_element):
    built = compiled("sm_90", param, moment, master, amsgrad, True, weight_copy=weight_copy)
    assert spill_free(built) and resources(built).registers <= (100 if moment == "8bit" else 80)
    total, _ = moved(built)
    assert total == 8 * per_element and "f64" not in built.asm["ttir"]
    # machine code: one access of 8 elements for each 16-bit tensor, two for each float32 one
    wide = count(built, "LDG.E.128") + count(built, "STG.E.128")
    codes = 2 * 2 * 8 if moment == "8bit" else 0  # read and written, 8 bytes at a time
    scales = 2 * 2 * 4 / 8 if moment == "8bit" else 0
    assert 16 * wide + codes + scales == 8 * per_element
    assert count(built, "STG.E.64") == (2 if moment == "8bit" else 0)
    assert not re.search(r"\b(LDG|STG)\.E\.(U16|S16|U8)", sass(built))


def test_the_docstring_states_these_bytes():
    stated = re.search(r"Bytes.*", head_adamw_kernel.fn.__doc__, re.DOTALL)[0]
    for words in ("22 for bf16 weights with fp32", '26 with MASTER "split"', "28 for fp32", '14.25 for bf16 "split"',
                  "112 of work list"):
        assert words in " ".join(stated.split()), words
    assert 8 * len(Tile._fields) == 112


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("param, moment, master", [("bf16", "fp32", "split"), ("fp32", "fp32", None),
                                                   ("bf16", "8bit", "split")])
def test_head_adamw_compiles_everywhere_without_spills(target, aligned, param, moment, master):
    built = compiled(target, param, moment, master, False, aligned, weight_copy=True)
    assert spill_free(built)
    if aligned and not target.startswith("gfx"):
        assert count(built, "LDG.E.128") >= (3 if moment == "8bit" else 6)


def test_the_unhinted_variant_has_no_wide_access():
    built = compiled("sm_90", "bf16", "bf16", "stochastic", False, False)
    assert spill_free(built) and count(built, "STG.E.128") == 0


def test_without_control_the_kernel_is_the_same_but_for_two_loads():
    with_control, without = (compiled("sm_90", "bf16", "fp32", "split", False, True, control) for control in (True, False))
    scalars = [len(re.findall(r"\bLDG\.E(?:\.64|\.CONSTANT)*\b(?!\.128)", sass(b))) for b in (with_control, without)]
    assert scalars[0] == scalars[1] + 2 and count(without, "LDG.E.128") == 7


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False])
def test_every_variant_compiles_for_every_target_without_spills(target, aligned):
    for param, moment, master, amsgrad, weight_copy, _ in VARIANTS:
        assert spill_free(compiled(target, param, moment, master, amsgrad, aligned, weight_copy=weight_copy)), (param, moment, master)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grad", ["bf16", "fp32"])
def test_head_grad_norm(target, grad):
    signature = {"tiles_ptr": "*i64", "pointers_ptr": "*i64", "partial_ptr": "*fp32"}
    built = build(head_grad_norm_kernel, signature, {"GRAD": TYPES[grad], "ALIGNED": True, "GROUPS": GROUPS},
                  target=target, aligned=tuple(signature))
    assert spill_free(built)
    if not target.startswith("gfx"):
        assert count(built, "LDG.E.128") == (1 if grad == "bf16" else 2)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("moment", ["fp32", "8bit"])
def test_offsets_are_64_bit(aligned, moment):
    """Offsets of data come from int64 tables and stay int64: no 32-bit product feeds an address."""
    assert not narrow_offsets(compiled("sm_90", "bf16", moment, "split", False, aligned, weight_copy=True))


def narrow_offsets(built):
    """Lines of the IR in which a 32-bit offset, or a 32-bit product that was widened, feeds an address."""
    ttir = built.asm["ttir"]
    found = [line for line in ttir.splitlines() if "tt.addptr" in line and "tensor<" in line and "x1x!tt" not in line
             and "xi64>" not in line.rsplit(":", 1)[1]]
    made = dict(re.findall(r"(%\w+) = ([\w.]+ .*)", ttir))
    return found + [text for text in made.values()
                    if text.startswith("arith.extsi") and "i32> to tensor" in text and not _bounded(made, text)]


def _bounded(made, text):
    """A 32-bit value that ends as an offset is a row or column: a quotient or remainder, times 8 at most."""
    operands = re.findall(r"%\w+", text.split(":")[0])
    source = made.get(operands[0], "")
    while source.startswith(("tt.broadcast", "tt.expand_dims", "arith.muli")):
        if source.startswith("arith.muli") and not any("dense<8>" in made.get(o, "") for o in re.findall(r"%\w+", source)):
            return False
        source = made.get(re.findall(r"%\w+", source)[0], "")
    return source.startswith(("arith.divsi", "arith.remsi", "tt.make_range", "arith.constant"))


def test_a_32_bit_offset_is_seen(tmp_path):
    """The gate above, on a copy of the kernel whose offsets of param are products of 32 bits."""
    package = tmp_path / "narrow_kernels"
    shutil.copytree(Path(csrc_triton.__path__[0]), package)
    wide = "offs_p = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED)"
    narrow = wide.replace("row * _field(tile, TILE_P_STRIDE, ALIGNED)",
                          "(row.to(tl.int32) * _field(tile, TILE_P_STRIDE, ALIGNED).to(tl.int32)).to(tl.int64)")
    file = package / "head_adamw.py"
    file.write_text(edit(file.read_text(), (wide, narrow)))
    spec = importlib.util.spec_from_file_location("narrow_kernels", package / "__init__.py",
                                                  submodule_search_locations=[str(package)])
    sys.modules["narrow_kernels"] = importlib.util.module_from_spec(spec)
    try:
        kernel = importlib.import_module("narrow_kernels.head_adamw").head_adamw_kernel
        for aligned in (True, False):
            assert narrow_offsets(compiled("sm_90", "bf16", "fp32", "split", False, aligned, kernel=kernel))
    finally:
        for name in [name for name in sys.modules if name.startswith("narrow_kernels")]:
            del sys.modules[name]
