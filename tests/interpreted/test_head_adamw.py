"""The AdamW kernel under the interpreter: the formula in float64, the oracle's bits, frozen bytes."""

import pytest
import torch
from torch import nn

from alps_kernels.ops import GradControl, head_adamw_, head_grad_norm, join_master
from alps_kernels.ops.adamw import op, oracle, plan, tables
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam
from alps_kernels.tensors import synced_slice_of
from tests.optim.cases import (
    assert_frozen, bind, fill_grads, formula, make, run, same_bytes, selection, sliced_module, snapshot, toy,
)

EIGHT = "8bit"
ALIGNED = dict(rows=((0, 8), (16, 24)), cols=((0, 8), (16, 24)), bias=((8, 24),))
ODD = dict(rows=((0, 7), (15, 24)), cols=((0, 5), (16, 19)), bias=((7, 20),))
# float32: the kernel and the oracle each round a dozen times; float16 and bfloat16 add the store
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def backend_torch_is_the_oracle(monkeypatch):
    monkeypatch.setattr(op, "cpu", oracle)


def pair(dtype, ranges, seed=0, **options):
    """The same run on the kernel and on the oracle: (params, optimizer) of each."""
    made = []
    for backend in ("triton", "torch"):
        params, _ = toy(dtype, seed=seed)
        optimizer = make(params, selection(params, **ranges), **options)
        optimizer._backend = backend
        made.append((params, optimizer))
    return made


def agree(kernel, plain, dtype):
    """16-bit weights bit for bit, but where float32 roundings fall on two sides of a tie: one in 500."""
    for name in kernel:
        a, b = kernel[name].detach(), plain[name].detach()
        gap = (a.double() - b.double()).abs()
        assert gap.max() <= TOLERANCE[dtype] * max(1.0, b.double().abs().max().item()), name
        if dtype != torch.float32:
            assert (gap > 0).double().mean() <= 1 / 500, name


@pytest.mark.parametrize("ranges", [ALIGNED, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype, master, moments, amsgrad", [
    (torch.float32, None, torch.float32, False),
    (torch.float32, None, torch.bfloat16, True),
    (torch.bfloat16, None, torch.float32, False),
    (torch.bfloat16, "split", torch.float32, True),
    (torch.bfloat16, "kahan", torch.float32, False),
    (torch.bfloat16, "stochastic", torch.bfloat16, True),
    (torch.float16, "split", torch.float32, False),
    (torch.float16, "kahan", torch.bfloat16, False),
    (torch.float16, "stochastic", torch.float32, False),
    (torch.float32, None, EIGHT, False),
    (torch.bfloat16, "split", EIGHT, False),
    (torch.float16, "stochastic", EIGHT, False),
], ids=str)
def test_head_adamw(ranges, dtype, master, moments, amsgrad):
    (params, optimizer), (other, plain) = pair(dtype, ranges, master=master, moment_dtype=moments, amsgrad=amsgrad,
                                               seed=3)
    before = snapshot(params)
    for p, o in ((params, optimizer), (other, plain)):
        run(p, o, o.heads, 2)
    assert_frozen(params, before, optimizer.heads)
    agree(params, other, dtype)
    for part in optimizer.heads.params:
        mine, theirs = optimizer.state[part.param], plain.state[other[part.name]]
        assert mine.keys() == theirs.keys()
        if moments == EIGHT:  # a code of 200 may be 199 where a root falls on two sides of a tie
            for key in ("exp_avg", "exp_avg_sq"):
                gap = (mine[key].int() - theirs[key].int()).abs()
                assert gap.max() <= 1 and (gap > 0).double().mean() <= 1 / 100, key
            mine, theirs = (o._slots[p].decoded(o.state[p]) for o, p in ((optimizer, part.param), (plain, other[part.name])))
            torch.testing.assert_close(mine["exp_avg"], theirs["exp_avg"], rtol=0.05, atol=1e-7)
            continue
        for key in mine.keys() - {"step", "master_lo", "kahan"}:
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6 if moments == torch.float32 else 1e-2, atol=3e-8)


def large(backend, ranges, **options):
    """Rectangles of columns and a run of rows, of several tiles each, after 2 steps: (params, optimizer)."""
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(72, 64, generator=generator).bfloat16()) for name in ("rows", "cols")}
    bound = bind(BoundParam("rows", params["rows"], 0, ranges), BoundParam("cols", params["cols"], 1, ranges))
    optimizer = make(params, bound, **options)
    optimizer._backend = backend
    before = snapshot(params)
    run(params, optimizer, bound, 2)
    assert_frozen(params, before, bound)
    return params, optimizer


@pytest.mark.parametrize("ranges", [((0, 24), (40, 56)), ((1, 22), (30, 53))], ids=["aligned", "odd"])
@pytest.mark.parametrize("moments", [torch.bfloat16, EIGHT], ids=str)
def test_tiles_of_any_size_give_the_same_bits(ranges, moments, monkeypatch):
    """Random numbers count state elements and scales count 64s of a block: neither knows of tiles."""
    results = []
    for tile in (1024, 512, 2048):
        monkeypatch.setattr(tables, "TILE", tile)
        monkeypatch.setattr(plan, "TILE", tile)
        params, optimizer = large("triton", ranges, master="stochastic", moment_dtype=moments)
        results.append([*params.values(), *(t for s in optimizer.state.values() for t in list(s.values())[1:])])
    assert all(same_bytes(a, b) and same_bytes(a, c) for a, b, c in zip(*results, strict=True))
    agree(params, large("torch", ranges, master="stochastic", moment_dtype=moments)[0], torch.bfloat16)


@pytest.mark.parametrize("dim, ranges", [(0, ((0, 8), (16, 40))), (1, ((8, 24), (40, 48))), (1, ((3, 10), (20, 33)))])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype, master, moments", [
    (torch.float32, None, torch.float32), (torch.bfloat16, "split", EIGHT), (torch.bfloat16, "stochastic", torch.bfloat16),
], ids=str)
def test_a_leaf_writes_its_weight_and_moves_as_the_unsliced_weight(dim, ranges, backend, dtype, master, moments):
    """Bit for bit, in one launch, and the rest of the weight stays."""
    weight = torch.randn(48, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    module, whole = sliced_module(weight.clone(), dim, ranges), nn.Parameter(weight.clone())
    leaf = module.weight_slice
    part = BoundParam("w", whole, dim, ranges)
    options = dict(lr=1e-2, weight_decay=0.1, master=master, moment_dtype=moments, max_grad_norm=0.7)
    ours, plain = HeadAdamW([leaf], **options), HeadAdamW([whole], heads=bind(part), **options)
    ours._backend = plain._backend = backend
    for step in range(3):
        whole.grad = torch.randn(48, 56, generator=torch.Generator().manual_seed(step)).to(dtype)
        leaf.grad = synced_slice_of(leaf).cut(whole.grad)
        ours.step()
        plain.step()
        assert not synced_slice_of(leaf).stale(module.weight, leaf), "the projection would copy again"
    assert same_bytes(module.weight, whole) and same_bytes(leaf, synced_slice_of(leaf).cut(whole))
    assert all(same_bytes(a.reshape(-1), b) for a, b in zip(list(ours.state[leaf].values())[1:],
                                                             list(plain.state[whole].values())[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_head_adamw_is_the_formula_in_float64(dtype):
    (params, optimizer), _ = pair(dtype, ALIGNED)
    start, generator, grads = snapshot(params), torch.Generator().manual_seed(1), []
    for _ in range(3):
        fill_grads(params, optimizer.heads, generator)
        grads.append({name: p.grad.clone() for name, p in params.items()})
        optimizer.step()
    for name, want in formula(start, optimizer.heads, grads).items():
        error = (params[name].detach().double() - want).abs()
        assert (error <= (want.abs() * torch.finfo(dtype).eps + 1e-6)).all(), name


def test_the_split_master_is_bit_equal_to_the_oracles():
    (params, optimizer), (other, plain) = pair(torch.bfloat16, ALIGNED, lr=2e-5)
    for p, o in ((params, optimizer), (other, plain)):
        run(p, o, o.heads, 3)
    for part in optimizer.heads.params:
        mine, theirs = (join_master(part.cut(p[part.name].detach()), o.state[p[part.name]]["master_lo"].reshape(-1))
                        for p, o in ((params, optimizer), (other, plain)))
        assert ((mine - theirs).abs() <= 2.0**-23 * theirs.abs() + 1e-10).all()


def test_maximize_zero_beta_and_groups_of_their_own():
    made = []
    for backend in ("triton", "torch"):
        params, bound = toy()
        groups = [dict(params=[params["rows"], params["frozen"]], maximize=True, betas=(0.0, 0.9), eps=1e-3),
                  dict(params=[params["cols"], params["all"], params["bias"]], lr=0.3, weight_decay=0.5, betas=(0.4, 0.99))]
        optimizer = HeadAdamW(groups, heads=bound)
        optimizer._backend = backend
        run(params, optimizer, bound, 2)
        made.append(params)
    agree(*made, torch.float32)


def test_elements_of_different_ages_have_their_own_bias_correction():
    made = pair(torch.float32, ALIGNED)
    for params, optimizer in made:
        run(params, optimizer, optimizer.heads, 2)
        optimizer.set_heads(selection(params, rows=((4, 20),), cols=((4, 24),), bias=((0, 48),)))
        run(params, optimizer, optimizer.heads, 2, seed=4)
    agree(made[0][0], made[1][0], torch.float32)


@pytest.mark.parametrize("ranges", [ALIGNED, ODD], ids=["aligned", "odd"])
def test_scaling_and_clipping(ranges):
    made = pair(torch.float32, ranges, max_grad_norm=0.5)
    for params, optimizer in made:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        run(params, optimizer, optimizer.heads, 2)
    agree(made[0][0], made[1][0], torch.float32)
    assert made[0][1].grad_norm.item() == pytest.approx(made[1][1].grad_norm.item(), rel=1e-6)


@pytest.mark.parametrize("norm", [0.01, 0.5, 3.0, float("inf"), float("nan")])
def test_the_norm_clips_inside_the_kernel(norm):
    """As `clip_grad_norm_`: max_norm / (norm + 1e-6), at most 1; an infinite norm gives zeros, NaN gives NaN."""
    made, states = pair(torch.float32, ALIGNED), []
    for params, optimizer in made:
        fill_grads(params, optimizer.heads, torch.Generator().manual_seed(1))
        cache = optimizer._cold()
        states.append(cache.states)
        control = GradControl(torch.tensor(8.0), torch.tensor(norm, dtype=torch.float64), 0.5, torch.tensor(0.0))
        head_adamw_(cache.updates, cache.hypers(), control=control, backend=optimizer._backend)
    for kernel, plain in zip(made[0][0].values(), made[1][0].values(), strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=1e-7, equal_nan=True)
    moments, wanted = (torch.cat([state["exp_avg"].reshape(-1) for state in each]) for each in states)
    torch.testing.assert_close(moments, wanted, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert moments.isnan().all() if norm != norm else (moments == 0).all() == (norm == float("inf"))


@pytest.mark.parametrize("tiles", [1, 2])
def test_programs_of_any_number_of_tiles_give_the_same_bits(tiles, monkeypatch):
    """A work list of 11 tiles of 512: no whole number of programs of 2, or of 8 for the norm, which finds tiles of nothing."""
    results, norms = [], []
    for step, norm in ((tiles, 8), (1, 1)):
        for module in (tables, plan):
            monkeypatch.setattr(module, "TILE", 512)
        monkeypatch.setattr(plan, "TILES", step)
        monkeypatch.setattr(plan, "NORM_TILES", norm)
        params, optimizer = large("triton", ((0, 24), (40, 56)), master="stochastic", moment_dtype=torch.bfloat16)
        results.append([*params.values(), *(t for s in optimizer.state.values() for t in list(s.values())[1:])])
        norms.append(head_grad_norm(optimizer._cold().updates, grad_scale=torch.tensor(4.0), backend="triton").item())
    assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))
    fill = [part.cut(part.param.grad) for part in optimizer.heads.params]
    want = torch.cat([grad.reshape(-1) for grad in fill]).double().norm().item() / 4
    assert norms == pytest.approx([want, want], rel=1e-6)


def test_zero_beta1_gives_the_gradient_itself():
    """However large the moment was: torch's lerp goes from the nearer end."""
    (params, optimizer), _ = pair(torch.float32, ALIGNED, betas=(0.0, 0.999))
    for scale in (1e6, 1e-6):
        run(params, optimizer, optimizer.heads, 1, scale=scale)
    for part in optimizer.heads.params:
        assert torch.equal(optimizer.state[part.param]["exp_avg"].reshape(-1), part.cut(part.param.grad).reshape(-1))


def test_the_gradient_norm_is_of_the_selection_and_repeats():
    (params, optimizer), _ = pair(torch.float32, ALIGNED)
    fill_grads(params, optimizer.heads, torch.Generator().manual_seed(0), outside=float("inf"))
    updates = optimizer._cold().updates
    norms = [head_grad_norm(updates, backend="triton").item() for _ in range(2)]
    want = torch.cat([part.cut(part.param.grad) for part in optimizer.heads.params]).double().norm().item()
    assert norms[0] == norms[1] == pytest.approx(want, rel=1e-6)
    assert oracle.head_grad_norm(updates).item() == pytest.approx(want, rel=1e-12)


def test_skip_flag_of_the_device_moves_nothing():
    (params, optimizer), _ = pair(torch.float32, ALIGNED)
    before = snapshot(params)
    fill_grads(params, optimizer.heads, torch.Generator().manual_seed(1))
    cache = optimizer._cold()
    head_adamw_(cache.updates, cache.hypers(), control=GradControl(found_inf=torch.tensor(1.0)), backend="triton")
    assert all(same_bytes(params[name], before[name]) for name in params)
    assert not any(state["exp_avg"].any() for state in cache.states)
    head_adamw_(cache.updates, cache.hypers(), backend="triton")
    assert_frozen(params, before, optimizer.heads)


def test_strided_rows_and_gradients_of_another_layout():
    torch.manual_seed(0)
    base, grads = torch.randn(40, 40), torch.randn(3, 40, 48)
    results = []
    for backend in ("triton", "torch"):
        memory = base.clone()
        param = nn.Parameter(memory[:, :32])  # rows with a stride
        optimizer = HeadAdamW([param], lr=1e-2, heads=bind(BoundParam("w", param, 0, ((4, 21), (30, 40)))))
        optimizer._backend = backend
        for grad in grads:
            param.grad = grad[:, :32]
            optimizer.step()
        assert torch.equal(memory[:, 32:], base[:, 32:]) and torch.equal(memory[:4], base[:4])
        results.append(param.detach())
    assert (results[0] - results[1]).abs().max() < 1e-6 and not torch.equal(results[0], base[:, :32])


def test_canaries_around_the_compact_state_live():
    params, bound = toy(torch.bfloat16)
    optimizer = make(params, selection(params, **ODD))
    optimizer._backend = "triton"
    run(params, optimizer, optimizer.heads, 1)
    walls = []
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "master_lo"):
            inner = state[key]
            memory = torch.full((inner.numel() + 64,), 77, dtype=inner.dtype)
            memory[32:-32] = inner.reshape(-1)
            state[key] = memory[32:-32].view(inner.shape)
            walls.append(memory)
    run(params, optimizer, optimizer.heads, 2)
    assert all((memory[:32] == 77).all() and (memory[-32:] == 77).all() for memory in walls)
