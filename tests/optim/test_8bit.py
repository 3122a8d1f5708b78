"""8-bit moments: the stated error, no stall, state in and out, and no worse than what others offer."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from alps_kernels.ops import decode8, encode8, encode8_stochastically
from alps_kernels.ops.adamw.quantize8 import QUANTUM
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam

from .cases import assert_frozen, bind, make, masks, run, same_bytes, selection, snapshot, toy

EIGHT = dict(moment_dtype="8bit")


def spread(n, seed, decades):
    """Magnitudes over some decades, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))
    return x * (torch.rand(n, generator=generator) > 0.05) * 1e-3


def largest(x):
    rows = torch.nn.functional.pad(x.abs(), (0, -x.numel() % QUANTUM)).view(-1, QUANTUM)
    return rows.amax(1, keepdim=True).expand_as(rows).reshape(-1)[:x.numel()].double()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 400), seed=st.integers(0, 1000), decades=st.floats(0, 12))
def test_errors_are_as_stated(n, seed, decades):
    x = spread(n, seed, decades)
    top = largest(x) ** 0.25
    root = lambda t: t.abs().double() ** 0.25  # noqa: E731
    codes, scales = encode8(x)
    back = decode8(codes, scales)
    assert codes.dtype == torch.int8 and len(scales) == -(-n // QUANTUM)
    assert ((root(back) - root(x)).abs() <= top / 254 * (1 + 1e-5)).all()
    assert (back.sign() * x.sign() >= 0).all()
    v = x.square()
    top = largest(v) ** 0.25
    codes, scales = encode8_stochastically(v, torch.randint(0, 65536, (n,)))
    back = decode8(codes, scales)
    assert ((root(back) - root(v)).abs() <= top / 255 * (1 + 1e-5)).all()
    assert torch.equal(back == 0, v == 0), "0 is kept for 0 alone"
    for value, decoded in ((x, decode8(*encode8(x))), (v, back)):
        at = value.abs().double() == largest(value)
        torch.testing.assert_close(decoded[at], value[at], rtol=2e-6, atol=0)


def test_second_moments_are_right_in_the_mean():
    v = spread(QUANTUM, 3, 3).square()
    bits = torch.arange(65536).repeat_interleave(1)[torch.randperm(65536)]
    mean, n = torch.zeros(QUANTUM, dtype=torch.float64), 4096
    for i in range(n):
        mean += decode8(*encode8_stochastically(v, bits[i * 16 % 65536].expand(QUANTUM))).double() / n
    spacing = 4 / 255 * (v.double() ** 0.75) * v.max().double() ** 0.25
    clear = v > 1e-9 * v.max()
    assert ((mean - v).abs() <= 6 * spacing / math.sqrt(n) + 1e-5 * v)[clear].all()


def test_second_moments_neither_stall_nor_stick():
    """To nearest, codes would not follow changes of 0.1 % a step; an element that falls behind its 64 must come down."""
    param = nn.Parameter(torch.zeros(4096))
    optimizer = HeadAdamW([param], **EIGHT)
    grad = torch.ones(4096)
    for step in range(1200):
        param.grad = grad * torch.where(torch.arange(4096) % QUANTUM == 0, 1.0, 1.0 if step < 300 else 0.5)
        optimizer.step()
    moments = optimizer._slots[param].decoded(optimizer.state[param])["exp_avg_sq"].double()
    want = 0.25 * (1 - 0.999**900) + (1 - 0.999**300) * 0.999**900
    assert moments[torch.arange(4096) % QUANTUM != 0].mean().item() == pytest.approx(want, rel=0.01)


def test_what_is_not_finite_stays_so_and_in_its_64():
    for bad in (math.nan, math.inf):
        x = torch.rand(3 * QUANTUM)
        x[70] = bad
        for back in (decode8(*encode8(x)), decode8(*encode8_stochastically(x, torch.zeros(3 * QUANTUM)))):
            assert not back[70].isfinite() and back[:64].isfinite().all() and back[128:].isfinite().all()


def test_state_takes_2_125_bytes_an_element_and_frozen_bytes_stay():
    params, bound = toy(torch.bfloat16, n=256, d=64)
    before = snapshot(params)
    optimizer = make(params, bound, **EIGHT)
    run(params, optimizer, bound, 3)
    assert_frozen(params, before, bound)
    for part in bound.params:
        state = optimizer.state[part.param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "master_lo"}
        size = sum(t.numel() * t.element_size() for k, t in state.items() if k not in ("step", "master_lo"))
        blocks = [math.prod(block.shape) for block in part.blocks(part.param)]
        assert size == 2 * part.numel + 8 * sum(-(-n // 64) for n in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reselection_carries_what_stays(dtype):
    params, bound = toy(dtype)
    optimizer = make(params, bound, **EIGHT)
    run(params, optimizer, bound, 4)
    old = {part.name: optimizer._slots[part.param].spread(optimizer._slots[part.param].decoded(
        optimizer.state[part.param])["exp_avg"]) for part in bound.params}
    kept = {k: v.clone() for k, v in optimizer.state[params["all"]].items()}
    grown = selection(params, rows=((4, 20), (30, 32)), cols=((4, 24),), bias=((0, 48),))
    optimizer.set_heads(grown)
    assert all(torch.equal(optimizer.state[params["all"]][k], v) for k, v in kept.items()), "coded anew without need"
    was, now = masks(params, bound), masks(params, grown)
    for part in grown.params:
        slot = optimizer._slots[part.param]
        dense = slot.spread(slot.decoded(optimizer.state[part.param])["exp_avg"])
        stays, joins = was[part.name] & now[part.name], now[part.name] & ~was[part.name]
        top = old[part.name].abs().max() ** 0.25
        assert ((dense.abs() ** 0.25 - old[part.name].abs() ** 0.25)[stays].abs() <= top / 254 * 1.001).all()
        assert not dense[joins].any()
    middle = snapshot(params)
    run(params, optimizer, grown, 3, seed=2)
    assert_frozen(params, middle, grown)


def test_dense_state_goes_out_and_comes_in():
    params, bound = toy()
    optimizer = make(params, bound, **EIGHT)
    run(params, optimizer, bound, 4)
    dense = optimizer.dense_state_dict()
    plain = torch.optim.AdamW(params.values())
    plain.load_state_dict(dense)
    assert all(s["exp_avg"].dtype == torch.float32 and set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in dense["state"].values())
    again = make(params, bound, **EIGHT)
    again.load_state_dict(dense)
    for part in bound.params:  # what was decoded is its own code
        for key in ("exp_avg", "exp_avg_sq"):
            gap = optimizer.state[part.param][key].int() - again.state[part.param][key].int()
            assert gap.abs().max() <= 1 and (gap != 0).double().mean() < 0.01
    torch.testing.assert_close(again.dense_state_dict()["state"][0]["exp_avg"], dense["state"][0]["exp_avg"], rtol=1e-4, atol=1e-9)


def test_another_layout_of_the_weight_gives_the_same_bits():
    results = []
    for pad in (0, 8):
        memory = torch.randn(48, 40 + pad, generator=torch.Generator().manual_seed(0))
        memory = torch.cat([memory[:, :40].clone(), torch.zeros(48, pad)], 1) if pad else memory
        base = torch.randn(48, 40, generator=torch.Generator().manual_seed(5))
        memory[:, :40] = base
        param = nn.Parameter(memory[:, :40])
        optimizer = HeadAdamW([param], heads=bind(BoundParam("w", param, 0, ((4, 21), (30, 40)))), **EIGHT)
        for step in range(3):
            param.grad = torch.randn(48, 40, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        results.append((param.detach().clone(), *list(optimizer.state[param].values())[1:]))
    assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))


def distances(make_optimizer, features):
    """Of the weights from those of a float32 run after 25, 50, ..., 150 steps; the same data, the same start."""
    runs = []
    for factory in (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01), make_optimizer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32))
        target = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
        optimizer, seen = factory(model.parameters()), []
        for step in range(150):
            x = torch.randn(64, 64, generator=torch.Generator().manual_seed(step)) * features
            optimizer.zero_grad()
            (model(x) - target(x).detach()).square().mean().backward()
            optimizer.step()
            if step % 25 == 24:
                seen.append(torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()]))
        runs.append(seen)
    return [(a - b).norm().item() for a, b in zip(*runs, strict=True)]


FEATURES = {"even": torch.ones(64), "outliers": torch.logspace(-2, 1, 64)}


@pytest.mark.parametrize("rival", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("features", FEATURES)
def test_no_further_from_float32_than(rival, features):
    if rival == "torchao" and features == "even":
        pytest.skip("one run of torchao's compiled step is enough: it takes 10 s")
    module = pytest.importorskip({"bitsandbytes": "bitsandbytes", "torchao": "torchao.optim"}[rival])
    theirs = module.optim.AdamW8bit if rival == "bitsandbytes" else module.AdamW8bit
    other = distances(lambda p: theirs(list(p), lr=1e-3, weight_decay=0.01), FEATURES[features])
    ours = distances(lambda p: HeadAdamW(p, lr=1e-3, **EIGHT), FEATURES[features])
    assert other[-1] > 0 and all(a <= b for a, b in zip(ours, other, strict=True)), (ours, other)
