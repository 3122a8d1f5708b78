"""The AdamW kernels as compiled code: results, exact footprints, whole sectors, instructions."""

import pytest
import torch
from torch import nn

pytest.importorskip("ptxemu", reason="the emulator of PTX is not on the path: make emulate")

from alps_kernels.ops import head_grad_norm, join_master
from alps_kernels.ops.adamw import op, oracle, plan
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam
from alps_kernels.tensors import synced_slice_of
from tests.compiled.cases import DTYPES, VARIANTS
from tests.emulated.watch import WrongBytes, instructions, used, watched
from tests.optim.cases import bind, make, same_bytes, sliced_module
from tests.support.mutants import plant_kernel

pytestmark = pytest.mark.filterwarnings("ignore:.*no master")  # variants that round to nearest
# (dim, ranges, shape): what is selected of a weight
SLICES = {
    "rows of q, head 64": (0, ((0, 64), (192, 256)), (256, 128)),
    "columns of o, head 128": (1, ((0, 128), (256, 384)), (64, 512)),
    "columns of o, head 64": (1, ((64, 128), (256, 320)), (96, 512)),
    "columns of o, head 80": (1, ((80, 160), (240, 320)), (96, 640)),
    "columns, 8 wide": (1, ((8, 16), (40, 48)), (512, 64)),
    "columns at odd places": (1, ((3, 64), (129, 190)), (80, 320)),
    "rows of 61 columns": (0, ((1, 22), (30, 53)), (64, 61)),
}
WIDE = "columns of o, head 128"
ODD = "columns at odd places"
MAIN = [VARIANTS[0], VARIANTS[6], VARIANTS[13]]
# PTX instructions an element in the longest of these variants, scalars of the tables included; a tenth more is allowed.
MOST = {"fp32": 76, "bf16": 104, "8bit": 156}


def name(variant):
    return "-".join(map(str, variant[:3])) + "-amsgrad" * variant.amsgrad + "-copy" * variant.weight_copy


def prepared(variant, where, backend, **options):
    """An optimizer over a slice, and what gives it the gradients of step k."""
    dim, ranges, shape = SLICES[where]
    dtype = DTYPES[variant.param]
    options = dict(master=variant.master, moment_dtype=DTYPES[variant.moment], amsgrad=variant.amsgrad, **options)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if variant.weight_copy:
        module = sliced_module(weight, dim, ranges)
        param = module.weight_slice
        optimizer = HeadAdamW([param], lr=1e-2, weight_decay=0.1, **options)
    else:
        module, param = None, nn.Parameter(weight)
        optimizer = make({"w": param}, bind(BoundParam("w", param, dim, ranges)), **options)
    optimizer._backend = backend

    def fill(k):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype)
        param.grad = synced_slice_of(param).cut(grad).contiguous() if variant.weight_copy else grad

    return param, optimizer, fill, module


def stepped(variant, where, backend, steps=2, **options):
    param, optimizer, fill, module = prepared(variant, where, backend, **options)
    for k in range(steps):
        fill(k + 1)
        optimizer.step()
    if module is not None:
        assert same_bytes(param, synced_slice_of(param).cut(module.weight)), "the copy of the weight is another"
    return param.detach(), optimizer.state[param]


def selected(where):
    dim, ranges, shape = SLICES[where]
    return sum(stop - start for start, stop in ranges) * shape[1 - dim]


def agree(variant, ours, theirs):
    """The kernel and the oracle: each rounds some dozen times in float32, and a value next to a tie may go either way."""
    (param, state), (other, wanted) = ours, theirs
    eps = torch.finfo(param.dtype).eps
    gap = (param.double() - other.double()).abs()
    assert (gap <= eps * other.double().abs() + 1e-6).all()
    if param.dtype != torch.float32:
        assert (gap > 0).double().mean() <= 1 / 500
    for key in state.keys() - {"step", "master_lo", "kahan"}:
        a, b = state[key], wanted[key]
        if a.dtype in (torch.int8, torch.uint8):
            # A code next to a tie may go either way; in the next step it may move a sum next to 0 by several codes.
            gap = (a.int() - b.int()).abs()
            assert (gap > 0).double().mean() <= 1 / 1000 and (gap > 1).double().mean() <= 1 / 4000, key
        elif key.endswith("scale"):  # of the largest of 64, which one such code may have moved
            assert ((a - b).abs() > 2e-6 * b).double().mean() <= 1 / 100 and torch.allclose(a, b, rtol=0.02), key
        else:
            rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[a.dtype]
            torch.testing.assert_close(a, b, rtol=rtol, atol=3e-8, msg=lambda text, key=key: f"{key}: {text}")
    if "master_lo" in state and variant.param == "bf16" and not variant.weight_copy and param.shape == state["master_lo"].shape:
        assert (join_master(param, state["master_lo"]) - join_master(other, wanted["master_lo"])).abs().max() <= 1e-6


def run(variant, where, target, monkeypatch):
    monkeypatch.setattr(op, "cpu", oracle)
    with watched(target) as session:
        ours = stepped(variant, where, "triton")
    assert session.checked == 2
    agree(variant, ours, stepped(variant, where, "torch"))
    launch = session.launches[-1]
    if where not in (ODD, "rows of 61 columns"):
        # Rows of 8 elements of 16 bits have 16 bytes: half of a sector is another row's.
        assert used(launch) >= (0.95 if where != "columns, 8 wide" else 0.5), used(launch)
        assert instructions(launch, selected(where)) <= 1.1 * MOST[variant.moment], instructions(launch, selected(where))


@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("where", [WIDE, ODD])
def test_every_variant(variant, where, monkeypatch):
    run(variant, where, "sm_80", monkeypatch)


@pytest.mark.parametrize("variant", MAIN, ids=name)
@pytest.mark.parametrize("where", [where for where in SLICES if where not in (WIDE, ODD)])
def test_every_slice(variant, where, monkeypatch):
    if not (variant.weight_copy and where == "rows of 61 columns"):
        run(variant, where, "sm_80", monkeypatch)


@pytest.mark.parametrize("variant", MAIN, ids=name)
def test_sm_90(variant, monkeypatch):
    run(variant, WIDE, "sm_90", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", VARIANTS, ids=name)
@pytest.mark.parametrize("where", SLICES)
def test_everything(target, variant, where, monkeypatch):
    run(variant, where, target, monkeypatch)


@pytest.mark.parametrize("variant", [VARIANTS[13], VARIANTS[16]], ids=name)
def test_8_bit_codes_do_not_depend_on_approximate_instructions(variant):
    """Roots and quotients off by all the error that they may have: every code and every scale is the same."""
    states = []
    for approximation in ("exact", "up", "down", "random"):
        with watched("sm_80", approximation):
            states.append(stepped(variant, WIDE, "triton"))
    (param, first), *others = states
    for other, state in others:
        assert torch.allclose(other.float(), param.float(), rtol=torch.finfo(param.dtype).eps, atol=1e-6)
        assert all(same_bytes(state[key], first[key]) for key in first.keys() - {"step", "master_lo"})


@pytest.mark.parametrize("variant", MAIN, ids=name)
@pytest.mark.parametrize("tiles", [1, 2])
def test_found_inf_touches_nothing_and_tiles_of_a_program_change_no_bit(variant, tiles, monkeypatch):
    wanted = None
    for n in (1, tiles):
        monkeypatch.setattr(plan, "TILES", n)
        with watched() as session:
            param, optimizer, fill, _ = prepared(variant, WIDE, "triton", capturable=True, max_grad_norm=0.5)
            for k, found in enumerate((0.0, 1.0, 0.0)):
                fill(k + 1)
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
                optimizer.step()
            assert session.checked == 3
        wanted = wanted if wanted is not None else param.detach().clone()
        assert same_bytes(param, wanted)


@pytest.mark.parametrize("variant", MAIN, ids=name)
@pytest.mark.parametrize("where", [WIDE, "columns of o, head 80", ODD])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_head_grad_norm(variant, where, target):
    with watched(target) as session:
        param, optimizer, fill, _ = prepared(variant, where, "triton")
        fill(1)
        updates = optimizer._cold().updates
        norms = [head_grad_norm(updates, grad_scale=torch.tensor(2.0), backend="triton").item() for _ in range(2)]
    want = oracle.head_grad_norm(updates).item() / 2
    assert norms[0] == norms[1] == pytest.approx(want, rel=1e-6)
    launch = session.launches[-1]
    assert launch.kernel == "head_grad_norm_kernel"
    if where != ODD:
        assert used(launch) >= 0.95 and instructions(launch, selected(where)) <= 40


FAULTS = {  # what is wrong in the kernel: its file, the edits, the slice
    "the tile of the next program": ("head_adamw.py", [
        ("tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILES * TILE_FIELDS",
         "tile = tiles_ptr + (tl.program_id(0).to(tl.int64) + 1) * TILES * TILE_FIELDS")], WIDE),
    "stores past the limit": ("head_adamw.py", [
        ("    tl.store(p_ptrs, p, mask=mask)\n", "    tl.store(p_ptrs, p, mask=mask | (masks[1] == masks[1]))\n")], "columns of o, head 80"),
    "reads past the limit": ("head_adamw.py", [("count * L + lane < limit", "count * L + lane < limit + 8 * moves")],
                             "columns of o, head 80"),
    "vectors of 8 float32": ("head_adamw.py", [("L: tl.constexpr = (4 if PARAM", "L: tl.constexpr = (8 if PARAM")], WIDE),
    "threads at vectors that are not neighbours": ("head_adamw.py", [
        ("count = block * (64 // L) + vector // (GROUPS * 8 // (A * L)) * B + vector % B",
         "count = vector % 32 * (GROUPS * 8 // L // 32) + vector // 32")], WIDE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    file, edits, where = FAULTS[fault]
    plant_kernel(monkeypatch, tmp_path, file, *edits)
    with pytest.raises(AssertionError):
        run(VARIANTS[5], where, "sm_80", monkeypatch)


def test_a_read_under_found_inf_is_seen(monkeypatch, tmp_path):
    plant_kernel(monkeypatch, tmp_path, "head_adamw.py",
                 ("moves = (tl.load(found_inf_ptr) == 0.0).to(tl.int32)", "moves = (tl.load(found_inf_ptr) <= 1.0).to(tl.int32)"))
    with pytest.raises(WrongBytes):
        test_found_inf_touches_nothing_and_tiles_of_a_program_change_no_bit(VARIANTS[5], 1, monkeypatch)


def test_a_code_that_hangs_on_a_root_is_seen(monkeypatch, tmp_path):
    plant_kernel(monkeypatch, tmp_path, "quantize8.py",
                 ("    low += (size > _fourth_power(low - (WHOLE - 0.5), scale)).to(tl.float32)\n",
                  "    low = tl.minimum(root * unit, 127.0) + WHOLE\n"))
    with pytest.raises(AssertionError):
        test_8_bit_codes_do_not_depend_on_approximate_instructions(VARIANTS[13])
