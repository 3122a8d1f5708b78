"""The optimizer's kernels compile for every target: no spills, 16-byte accesses where hinted."""

import re

import pytest
import triton.language as tl

from alps_kernels.ops.adamw_tables import COLS, ROWS
from csrc_triton.head_adamw import head_adamw_kernel, head_grad_norm_kernel

from .offline import TARGETS, build, count, resources, sass, spill_free

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
TABLES = {"tiles_ptr": "*i64", "pointers_ptr": "*i64", "hypers_ptr": "*fp32", "control_ptr": "*fp32"}

# param, moments, master, amsgrad; 16-byte loads and stores of 8 elements in the aligned variant:
# 1 for each 16-bit tensor, 2 for each float32 one. Loads: param, grad, moments, low; stores: all but grad.
VARIANTS = [
    ("fp32", "fp32", None, False, 8, 6),
    ("fp32", "fp32", None, True, 10, 8),
    ("fp32", "bf16", None, False, 6, 4),
    ("bf16", "fp32", None, False, 6, 5),
    ("bf16", "fp32", "split", False, 7, 6),
    ("bf16", "fp32", "kahan", False, 7, 6),
    ("bf16", "fp32", "stochastic", False, 6, 5),
    ("bf16", "bf16", "split", False, 5, 4),
    ("bf16", "bf16", "stochastic", True, 5, 4),
    ("fp16", "fp32", "split", True, 9, 8),
    ("fp16", "bf16", "stochastic", False, 4, 3),
]


def compiled(target, param, moment, master, amsgrad, aligned, control=True):
    signature = {name: kind for name, kind in TABLES.items() if control or name != "control_ptr"}
    constants = {"PARAM": TYPES[param], "GRAD": TYPES[param], "MOMENT": TYPES[moment], "MASTER": master,
                 "AMSGRAD": amsgrad, "ALIGNED": aligned, "ROWS": ROWS, "COLS": COLS}
    return build(head_adamw_kernel, signature, constants if control else {**constants, "control_ptr": None},
                 target=target, aligned=tuple(signature))


@pytest.mark.parametrize("param, moment, master, amsgrad, loads, stores", VARIANTS)
def test_head_adamw_is_16_bytes_wide_without_spills(param, moment, master, amsgrad, loads, stores):
    built = compiled("sm_90", param, moment, master, amsgrad, True)
    assert spill_free(built) and resources(built).registers <= 80
    # one access for each of the 8 elements of a thread; the rest are scalars of the tables
    assert (count(built, "LDG.E.128"), count(built, "STG.E.128")) == (loads, stores)
    assert not re.search(r"\b(LDG|STG)\.E\.(U16|S16|U8)", sass(built))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("param, moment, master", [("bf16", "fp32", "split"), ("fp32", "fp32", None)])
def test_head_adamw_compiles_everywhere_without_spills(target, aligned, param, moment, master):
    built = compiled(target, param, moment, master, False, aligned)
    assert spill_free(built)
    if aligned and not target.startswith("gfx"):
        assert count(built, "LDG.E.128") >= 6


def test_the_unhinted_variant_has_no_wide_access():
    built = compiled("sm_90", "bf16", "bf16", "stochastic", False, False)
    assert spill_free(built) and count(built, "STG.E.128") == 0


def test_without_control_the_kernel_is_the_same_but_for_two_loads():
    with_control, without = (compiled("sm_90", "bf16", "fp32", "split", False, True, control) for control in (True, False))
    scalars = [len(re.findall(r"\bLDG\.E(?:\.64|\.CONSTANT)*\b(?!\.128)", sass(b))) for b in (with_control, without)]
    assert scalars[0] == scalars[1] + 2 and count(without, "LDG.E.128") == 7


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grad", ["bf16", "fp32"])
def test_head_grad_norm(target, grad):
    signature = {"tiles_ptr": "*i64", "pointers_ptr": "*i64", "partial_ptr": "*fp32"}
    built = build(head_grad_norm_kernel, signature, {"GRAD": TYPES[grad], "ALIGNED": True, "ROWS": ROWS, "COLS": COLS},
                  target=target, aligned=tuple(signature))
    assert spill_free(built)
    if not target.startswith("gfx"):
        assert count(built, "LDG.E.128") == (1 if grad == "bf16" else 2)


def test_offsets_are_64_bit():
    """Offsets of data come from int64 tables and stay int64: no 32-bit product feeds an address."""
    built = compiled("sm_90", "bf16", "fp32", "split", False, True)
    ttir = built.asm["ttir"]
    for line in ttir.splitlines():
        if "tt.addptr" in line and "tensor<" in line:
            assert "xi64>" in line.rsplit(":", 1)[1], line
