"""The optimizer's kernels as the host launches them, for every target: registers, spills, bytes, 16-byte accesses."""

import re
from collections import Counter

import pytest

from alps_kernels.ops.adamw.tables import TILE, Tile
from csrc_triton.head_adamw import head_adamw_kernel

from ..support.mutants import plant_kernel
from .cases import PLAIN, QUANTISED, SPLIT, VARIANTS, launches_of, step_launches, step_of
from .offline import NVIDIA, TARGETS, count, in_flight, lines, needed, resident, resources, sass, spill_free

pytestmark = pytest.mark.filterwarnings("ignore:.*no master")  # variants that round to nearest
MAIN = (PLAIN, SPLIT, QUANTISED)
KERNELS = {"step": "head_adamw_kernel", "norm": "head_grad_norm_kernel"}


def compiled(target, variant, aligned=True, everything=True, kernel="step"):
    return step_launches(variant, aligned, everything, target)[KERNELS[kernel]].compile(target)


def name(variant):
    return "-".join(map(str, variant[:3])) + "-amsgrad" * variant.amsgrad + "-copy" * variant.weight_copy


def tiles_of(variant, kernel="step"):
    """Tiles of a program."""
    return step_launches(variant)[KERNELS[kernel]].argument("TILES")


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_a_launch_is_that_of_its_variant(variant):
    for aligned in (True, False):
        launch = step_launches(variant, aligned)[KERNELS["step"]]
        assert str(launch.argument("PARAM")) == str(launch.argument("GRAD")) == variant.param
        assert str(launch.argument("MOMENT")) == {"8bit": "int8"}.get(variant.moment, variant.moment)
        assert [launch.argument(key) for key in ("MASTER", "AMSGRAD", "WEIGHT_COPY", "ALIGNED")] == [
            variant.master, variant.amsgrad, variant.weight_copy, aligned]
        for pointer in ("norm_ptr", "scale_ptr", "found_inf_ptr"):
            assert launch.argument(pointer) is not None
            assert step_launches(variant, aligned, False)[KERNELS["step"]].argument(pointer) is None


def check_resources(built, aligned):
    """No spills, and enough programs at once for the memory's bandwidth.

    An SM's programs must ask for as many bytes before they wait as arrive in the time that memory takes to answer.
    Tensors at odd places are few and small, so for them it is enough that one warp computes while another waits.
    Shared memory serves changes of layout and the sum of a program alone: it must not be what bounds their number.
    """
    what = resources(built), resident(built)
    assert spill_free(built), what
    assert resident(built) == resident(built, shared=False), what
    # two warps for each of four schedulers (on AMD: waves, SIMDs)
    assert resident(built) * built.metadata.num_warps >= 8, what
    if aligned and "cubin" in built.asm:
        assert in_flight(built) >= needed(built), (*what, in_flight(built), needed(built))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("variant", MAIN, ids=name)
def test_main_variants_have_the_resources_that_they_need(target, aligned, variant):
    check_resources(compiled(target, variant, aligned), aligned)


@pytest.mark.slow
@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_has_the_resources_that_it_needs(target, aligned, everything):
    failed = []
    for variant in VARIANTS:
        try:
            check_resources(compiled(target, variant, aligned, everything), aligned)
        except AssertionError as error:
            failed.append((name(variant), str(error).splitlines()[0]))
    assert failed == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", [PLAIN, SPLIT], ids=name)
def test_the_norm_has_the_resources_that_it_needs(target, variant):
    for aligned in (True, False):
        check_resources(compiled(target, variant, aligned, kernel="norm"), aligned)
    built = compiled(target, variant, kernel="norm")
    if target in NVIDIA:
        assert stated(built) == tiles_of(variant, "norm") * TILE * (2 if variant.param == "bf16" else 4)
        assert count(built, "LDG.E.128") == stated(built) / 16 / (32 * built.metadata.num_warps)


def accesses(built):
    """Of the data and of the tables, from the IR: [(rows, columns, bytes of an element)], and how many scalars."""
    tensors, scalars = [], 0
    for line in built.asm["ttir"].splitlines():
        if found := re.search(r"tt\.(load|store) .*: (tensor<(\d+)x(\d+)x)?!tt\.ptr<[a-z]+(\d+)>", line):
            if found[2] is None:
                scalars += 1
            else:
                tensors.append((int(found[3]), int(found[4]), int(found[5]) / 8))
    return tensors, scalars


def stated(built):
    """Bytes of a program's elements: an access of fewer than a tile has is of scales, one for 64 elements."""
    return sum(size * (TILE if rows * columns == TILE else TILE / 64) for rows, columns, size in accesses(built)[0])


def check_machine_code(built):
    """Every vector in one access: a row of the IR is a vector, of one thread, and so is a scale."""
    threads, expected, found = 32 * built.metadata.num_warps, Counter(), Counter()
    for rows, columns, size in accesses(built)[0]:
        expected[columns * size] += rows / threads
    for _, predicate, op, _ in lines(sass(built)):
        if op.startswith("STG") or (op.startswith("LDG") and predicate):  # data is under a mask, tables are not
            found[{"E.128": 16, "E.64": 8, "E": 4}.get(op[4:], op)] += 1
    assert found == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
def test_a_step_moves_the_bytes_it_states_in_wide_accesses(variant):
    built = compiled("sm_90", variant)
    assert stated(built) == TILE * variant.bytes * tiles_of(variant)
    assert not re.search(r"tensor<[^>]*f64", built.asm["ttir"])
    # 16 bytes of the widest type, so that neighbouring threads fill sectors of memory whatever the type
    assert max(columns * size for _, columns, size in accesses(built)[0]) == 16
    check_machine_code(built)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("variant", MAIN, ids=name)
def test_accesses_are_wide_on_every_target(target, variant):
    check_machine_code(compiled(target, variant))


def test_a_missing_hint_is_seen(tmp_path, monkeypatch):
    """Without it the compiler may not read 16 bytes at a time."""
    hint = "pointer = tl.multiple_of(pointer, 16)", "pass"
    check_machine_code(compiled("sm_90", SPLIT))
    with pytest.raises(AssertionError):
        check_machine_code(planted(tmp_path / "no_hint", monkeypatch, hint, True))


def test_the_docstring_states_these_bytes():
    said = re.search(r"Bytes.*", head_adamw_kernel.fn.__doc__, re.DOTALL)[0]
    for words in ("22 for bf16 weights with fp32", '26 with MASTER "split"', "28 for fp32", '14.25 for bf16 "split"',
                  "112 of work list"):
        assert words in " ".join(said.split()), words
    assert 8 * len(Tile._fields) == 112


def test_the_unhinted_variant_has_no_wide_access():
    assert count(compiled("sm_90", SPLIT, aligned=False), "STG.E.128") == 0


def test_without_clipping_and_scaling_the_kernel_is_the_same_but_for_three_loads():
    everything, plain = (compiled("sm_90", SPLIT, everything=e) for e in (True, False))
    assert stated(everything) == stated(plain) and accesses(everything)[1] == accesses(plain)[1] + 3
    assert count(everything, "LDG.E.128") == count(plain, "LDG.E.128")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("variant", [SPLIT, QUANTISED], ids=name)
def test_offsets_are_64_bit(aligned, variant):
    """Offsets of data come from int64 tables and stay int64: no 32-bit product feeds an address."""
    assert not narrow_offsets(compiled("sm_90", variant, aligned))


def narrow_offsets(built):
    """Lines of the IR in which a 32-bit offset, or a 32-bit product that was widened, feeds an address."""
    ttir = built.asm["ttir"]
    found = [line for line in ttir.splitlines() if "tt.addptr" in line and "tensor<" in line and "x1x!tt" not in line
             and "xi64>" not in line.rsplit(":", 1)[1]]
    made = dict(re.findall(r"(%\w+) = ([\w.]+ .*)", ttir))
    return found + [text for text in made.values()
                    if text.startswith("arith.extsi") and "i32> to tensor" in text and not _bounded(made, text)]


def _bounded(made, text):
    """A 32-bit value that ends as an offset is a row or column: a quotient or remainder, times a vector's length."""
    operands = re.findall(r"%\w+", text.split(":")[0])
    source = made.get(operands[0], "")
    while source.startswith(("tt.broadcast", "tt.expand_dims", "arith.muli")):
        short = any(re.search("dense<[48]>", made.get(o, "")) for o in re.findall(r"%\w+", source))
        if source.startswith("arith.muli") and not short:
            return False
        source = made.get(re.findall(r"%\w+", source)[0], "")
    return source.startswith(("arith.divsi", "arith.remsi", "tt.make_range", "arith.constant"))


def test_a_32_bit_offset_is_seen(tmp_path, monkeypatch):
    """The gate above, on a copy of the kernel whose offsets of param are products of 32 bits."""
    wide = "offs_p = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED)"
    narrow = wide.replace("row * _field(tile, TILE_P_STRIDE, ALIGNED)",
                          "(row.to(tl.int32) * _field(tile, TILE_P_STRIDE, ALIGNED).to(tl.int32)).to(tl.int64)")
    for aligned in (True, False):
        assert narrow_offsets(planted(tmp_path / f"aligned_{aligned}", monkeypatch, (wide, narrow), aligned))


def test_other_options_than_those_of_the_launch_are_seen():
    launch = step_launches(SPLIT)[KERNELS["step"]]
    check_resources(launch.compile("sm_90"), True)
    for other in ({"maxnreg": 32}, {"num_warps": 32}):  # spills; one program an SM, of which a thread loads little
        with pytest.raises(AssertionError):
            check_resources(launch.with_options(**other).compile("sm_90"), True)


def planted(folder, monkeypatch, fault, aligned):
    """The kernel of a step with this fault in it, as the host launches it."""
    folder.mkdir()
    with monkeypatch.context() as patch:
        plant_kernel(patch, folder, "head_adamw.py", fault)
        return launches_of(step_of(SPLIT, aligned), "sm_90")[KERNELS["step"]].compile("sm_90")
