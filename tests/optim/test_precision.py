"""16-bit weights really train: master weights, rounding, random bits; and mixed-precision scaling."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from alps_kernels.ops import join_master
from alps_kernels.ops.adamw.rounding import random_bits, round_stochastically, split
from alps_kernels.optim import HeadAdamW

from .cases import fill_grads, make, run, same_bytes, snapshot, toy

EDGES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 3.39e38, float("inf"),
         float("-inf"), 1.00390625, 1.01171875, 2.0 - 2**-23, 65504.0, 65519.9, 65520.0, 2**-14, 2**-17, 2**-24, 2**-25]


def floats(n=20000, seed=0):
    """float32 of every exponent and the edges."""
    bits = torch.randint(-2**31, 2**31 - 1, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    x = torch.cat([torch.tensor(EDGES), bits.view(torch.float32)])
    return x[~x.isnan()]


def test_split_bfloat16_is_a_bijection():
    x = floats()
    param, low = split(x, torch.bfloat16, torch.int16)
    assert torch.equal(join_master(param, low).view(torch.int32), x.view(torch.int32))
    # and every pair of 16-bit patterns that is no NaN comes back: pairs are float32, float32 are pairs
    pairs = torch.randint(-2**15, 2**15, (2, 20000), dtype=torch.int16)
    whole = join_master(pairs[0].view(torch.bfloat16), pairs[1])
    real = ~whole.isnan()
    param, low = split(whole, torch.bfloat16, torch.int16)
    assert torch.equal(param.view(torch.int16)[real], pairs[0][real]) and torch.equal(low[real], pairs[1][real])


def test_the_bfloat16_half_is_the_nearest_and_nans_stay():
    x = floats()
    x = x[x.abs() < 3.3e38]
    param, low = split(x, torch.bfloat16, torch.int16)
    gap = (param.double() - x.double()).abs()
    assert (gap <= (x.bfloat16().double() - x.double()).abs()).all()
    nan = torch.tensor([float("nan"), -float("nan")])
    nan = torch.cat([nan, torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    param, low = split(nan, torch.bfloat16, torch.int16)
    assert param.isnan().all() and join_master(param, low).isnan().all()


def test_split_float16_is_exact_where_it_says_so():
    x = floats(200000)
    x = torch.cat([x[x.abs() < 65504], torch.randn(20000), torch.randn(20000) * 1e-5])
    param, low = split(x, torch.float16, torch.int16)
    assert torch.equal(param, x.half())
    back, large = join_master(param, low), x.abs() >= 2.0**-17
    assert torch.equal(back[large], x[large])
    assert ((back - x)[~large].double().abs() <= 2.0**-40).all()
    param, low = split(torch.tensor([7e4, float("inf"), float("nan")]), torch.float16, torch.int16)
    assert torch.equal(join_master(param[:2], low[:2]), torch.tensor([float("inf")] * 2)) and param[2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_is_unbiased_and_goes_to_neighbours(dtype):
    for value in (1.0 + 2**-9 * 0.3, -3.14159, 1.7e-5, 2.0**-20 * 1.37, 6e-8):
        x = torch.full((2**16,), value)
        out = round_stochastically(x, torch.arange(2**16), dtype).double()
        spacing = out.max() - out.min()
        assert out.unique().numel() <= 2 and out.min() <= x[0] <= out.max()
        assert abs(out.mean() - x[0].double()) <= 2e-4 * spacing + 1e-45
    exact = floats().to(dtype).float()
    exact = exact[exact.isfinite()]
    for noise in (0, 0x1FFF, 0xFFFF):
        out = round_stochastically(exact, torch.full(exact.shape, noise), dtype)
        assert torch.equal(out.float(), exact)
    assert torch.equal(round_stochastically(torch.tensor([float("inf")]), torch.tensor([65535]), dtype).float(),
                       torch.tensor([float("inf")]))


def philox(counter, key):
    """Philox 4x32-10 in Python's whole numbers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = ((b >> 32) ^ counter[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ counter[3] ^ key[1], a & 0xFFFFFFFF)
        key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
    return counter


def test_random_bits_are_philox():
    # known answers of the Random123 distribution (kat_vectors, philox4x32-10)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    seed, step, stream, purpose = 0x123456789ABCDEF0, 77, 5, 2
    bits = random_bits(37, seed, step, stream, purpose)
    for i in range(37):
        word = philox((i // 8, 0, step, 4 * stream + purpose), (seed & 0xFFFFFFFF, seed >> 32))[(i % 8) // 2]
        assert bits[i] == (word >> 16 if i % 2 else word & 0xFFFF)
    assert torch.equal(random_bits(1000, 1, 2, 3, 0)[:500], random_bits(500, 1, 2, 3, 0))


def test_random_bits_are_even_and_independent():
    bits = torch.stack([random_bits(2**15, 0, step, stream, 0) for step in (1, 2) for stream in (0, 1)]).double()
    assert (bits.mean(1) - 32767.5).abs().max() < 4 * 65536 / (12 * 2**15) ** 0.5
    correlation = np.corrcoef(bits.numpy()) - np.eye(4)
    assert np.abs(correlation).max() < 4 / 2**7.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_split_master_is_a_float32_run(dtype):
    """Bit for bit: the master weights are what float32 weights with the same gradients become."""
    params, bound = toy(dtype)
    wide = {name: nn.Parameter(p.detach().float()) for name, p in params.items()}
    optimizer = make(params, bound, lr=2e-5)
    plain = torch.optim.AdamW(wide.values(), lr=2e-5, weight_decay=0.1)
    for step in range(30):
        fill_grads(params, bound, torch.Generator().manual_seed(step))
        for name, p in wide.items():
            p.grad = params[name].grad.float().nan_to_num(0.0)
        optimizer.step()
        plain.step()
    for part in bound.params:
        low = optimizer.state[part.param]["master_lo"].reshape(-1)
        master, want = join_master(part.cut(part.param.detach()), low), part.cut(wide[part.name].detach())
        large = want.abs() >= 2.0**-14 if dtype == torch.float16 else want.abs() >= 0
        assert torch.equal(master[large], want[large])
        assert (master - want).abs().max() < 1e-9


def unmoved(dtype, **options):
    """The share of weights of size 0.02 that 40 steps at lr 2e-5 leave where they were, and the error of the mean."""
    torch.manual_seed(0)
    param = nn.Parameter((torch.randn(4096) * 0.02).to(dtype))
    start = param.detach().clone()
    optimizer = HeadAdamW([param], lr=2e-5, weight_decay=0.0, **options)
    for _ in range(40):
        param.grad = torch.ones_like(param)  # every step is lr to the left
        optimizer.step()
    moved = (param.detach().double() - start.double()).mean()
    return (param == start).double().mean().item(), abs(moved.item() / (-40 * 2e-5) - 1)


def test_bfloat16_weights_really_train():
    lost, error = unmoved(torch.bfloat16, master=None)
    assert lost > 0.5 and error > 0.2  # what the options are for
    for options in (dict(), dict(master="kahan"), dict(master="stochastic"),
                    dict(master="split", moment_dtype=torch.bfloat16)):
        lost, error = unmoved(torch.bfloat16, **options)
        assert lost < 0.05 and error < 0.02, options


def test_bfloat16_second_moments_do_not_stall():
    """To nearest, exp_avg_sq would stop growing far below its limit at beta2 = 0.999."""
    param = nn.Parameter(torch.zeros(4096))
    optimizer = HeadAdamW([param], moment_dtype=torch.bfloat16)
    for _ in range(600):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert optimizer.state[param]["exp_avg_sq"].double().mean().item() == pytest.approx(1 - 0.999**600, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 47), dim=st.integers(0, 1))
def test_stochastic_rounding_does_not_depend_on_the_blocks(cut, dim):
    """One range or two adjacent ages: the random bits count state elements, not tiles."""
    from alps_kernels.ops import Block, HyperRow, HyperTable, ParamUpdate, head_adamw_

    shape = (48, 4) if dim == 0 else (4, 48)
    hyper = HyperRow.of(dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, maximize=False), 1.0)
    other = 4 if dim == 0 else 48
    results = []
    for edges in ((0, 48), (0, cut, 48)):
        generator = torch.Generator().manual_seed(0)
        param = torch.randn(shape, generator=generator).bfloat16()
        grad = torch.randn(shape, generator=generator).bfloat16()
        blocks = tuple(Block(dim, a, b, a * 4 if dim == 0 else a, other) for a, b in zip(edges, edges[1:], strict=False))
        moments = [torch.zeros(192, dtype=torch.bfloat16) for _ in range(2)]
        head_adamw_([ParamUpdate("w", param, grad, blocks, *moments, master="stochastic")], HyperTable([hyper]), seed=3)
        results.append((param, *moments))
    assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))


# -- mixed-precision scaling -----------------------------------------------------------------

def scaled_run(scale, *, found_inf=None, clip=None):
    params, bound = toy()
    optimizer = make(params, bound, max_grad_norm=clip)
    run(params, optimizer, bound, 2)
    generator = torch.Generator().manual_seed(4)
    fill_grads(params, bound, generator, scale=scale or 1.0)
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = found_inf
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scale_divides_the_gradients(clip):
    plain, _ = scaled_run(None, clip=clip)
    scaled, optimizer = scaled_run(65536.0, found_inf=torch.tensor(0.0), clip=clip)
    for name in plain:
        assert (plain[name] - scaled[name]).abs().max() <= (0.0 if clip is None else 1e-6)
    assert optimizer.state[scaled["rows"]]["step"] == 3
    if clip:
        assert optimizer.grad_norm.item() == pytest.approx(scaled_run(None, clip=clip)[1].grad_norm.item(), rel=1e-6)


def test_found_inf_moves_nothing_and_takes_no_step():
    params, bound = toy()
    optimizer = make(params, bound)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor([1.0])
    before = snapshot(params)
    run(params, optimizer, bound, 2)
    assert all(torch.equal(params[name], before[name]) for name in params) and not optimizer.state
    optimizer.found_inf = torch.tensor(0.0)
    run(params, optimizer, bound, 1)
    state = copy.deepcopy(optimizer.state[params["rows"]])
    optimizer.found_inf = torch.tensor(2.0)
    run(params, optimizer, bound, 2)
    assert all(torch.equal(optimizer.state[params["rows"]][key], value) for key, value in state.items())
    assert state["step"] == 1


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_runs_as_without(unscale):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        optimizer = HeadAdamW(model.parameters(), lr=1e-2)
        for i in range(8):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 8)).square().mean()
            if scaler is None:
                loss.backward()
                if i != 5:
                    optimizer.step()
                continue
            scaler.scale(loss).backward()
            if i == 5:
                model.weight.grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[model.weight]["step"] == 7
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not hasattr(optimizer, "grad_scale")
