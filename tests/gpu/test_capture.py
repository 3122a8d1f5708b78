"""CUDA graphs of the step, and `capturable`: against the formula, with `found_inf`, with gradients that move.

Skipped without CUDA; see cases.py.
"""

import copy

import pytest
import torch
from torch import nn

from alps_kernels import HeadAdamW
from tests.gpu import cases
from tests.gpu.cases import copies, equal, make, outside, refill_grads, set_grads, twin_of

pytestmark = cases.MARKS
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # a gradient of another step is off by about lr


def captured(optimizer):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def pair(dtype=torch.float32, **options):
    """Two capturable optimizers on equal parameters."""
    params, bound = make(dtype)
    twin, twin_bound = twin_of(params, bound)
    ours, other = (HeadAdamW(p, heads=b, capturable=True, **{**OPTIONS, **options})
                   for p, b in ((params, bound), (twin, twin_bound)))
    return (params, bound, ours), (twin, twin_bound, other)


def assert_close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


class Formula:
    """torch's AdamW in float64 on the CPU, on the selected slices alone."""

    def __init__(self, bound, **options):
        self.bound = bound
        self.cuts = [nn.Parameter(part.cut(part.param.detach()).cpu().double()) for part in bound.params]
        self.optimizer = torch.optim.AdamW(self.cuts, **options)

    def step(self, lr=None):
        for part, cut in zip(self.bound.params, self.cuts, strict=True):
            cut.grad = part.cut(part.param.grad).cpu().double()
        if lr is not None:
            self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def check(self, optimizer):
        for part, cut in zip(self.bound.params, self.cuts, strict=True):
            torch.testing.assert_close(part.cut(part.param.detach()).cpu().double(), cut.detach(), **CLOSE)
            state, expected = optimizer.state[part.param], self.optimizer.state[cut]
            assert state["step"].cpu().item() == expected["step"].item()
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                if name in expected:
                    found = state[name].cpu().double().flatten()
                    torch.testing.assert_close(found, expected[name].flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("options", [
    {}, {"weight_decay": 0.0, "maximize": True}, {"amsgrad": True}, {"betas": (0.5, 0.9), "eps": 1e-3},
    {"maximize": True, "amsgrad": True}], ids=str)
def test_capturable_steps_are_the_formula_s(options, replayed):
    options = {**OPTIONS, **options}
    params, bound = make(torch.float32)
    before = copies(params)
    lr = torch.tensor(options["lr"], device=cases.DEVICE)
    optimizer = HeadAdamW(params, heads=bound, capturable=True, **{**options, "lr": lr})
    formula = Formula(bound, **options)
    set_grads(params, bound, 0)
    graph = None
    for step in range(6):
        refill_grads(params, bound, step, scale=2.0 ** -step)  # falling, so that amsgrad's maximum matters
        lr.fill_(options["lr"] / (step + 1))
        if replayed and step == 2:
            graph = captured(optimizer)
        graph.replay() if graph else optimizer.step()
        formula.step(options["lr"] / (step + 1))
        formula.check(optimizer)
    for part, old in zip(bound.params, before, strict=True):
        assert torch.equal(outside(part, part.param.detach()), outside(part, old))


@pytest.mark.parametrize("clipped", [None, 0.5])
@pytest.mark.parametrize("replayed", [False, True], ids=["eager", "graph"])
def test_after_an_infinity_the_next_step_is_that_of_a_run_that_never_saw_it(replayed, clipped):
    (params, bound, ours), (twin, twin_bound, other) = pair(max_grad_norm=clipped)
    found = torch.zeros(1, device=cases.DEVICE)
    scale = torch.full((1,), 256.0, device=cases.DEVICE)
    ours.grad_scale = other.grad_scale = scale
    ours.found_inf, other.found_inf = found, torch.zeros_like(found)
    set_grads(params, bound, 0)
    set_grads(twin, twin_bound, 0)
    for step in range(2):
        refill_grads(params, bound, step)
        refill_grads(twin, twin_bound, step)
        ours.step()
        other.step()
    graph = captured(ours) if replayed else None
    before, moments = copies(params), copy.deepcopy([ours.state[p] for p in params])
    found.fill_(1.0)
    for part in bound.params:
        for block in part.blocks(part.param.grad):
            block.fill_(torch.inf)
    graph.replay() if graph else ours.step()
    assert equal(params, before)
    for param, old in zip(params, moments, strict=True):
        assert ours.state[param]["step"].item() == 2
        assert all(torch.equal(ours.state[param][name], old[name]) for name in old)
    found.fill_(0.0)
    refill_grads(params, bound, 2)
    refill_grads(twin, twin_bound, 2)
    graph.replay() if graph else ours.step()
    other.step()
    assert equal(params, twin) and not equal(params, before)
    assert all(ours.state[p]["step"].item() == 3 for p in params)


def test_a_capture_before_the_first_step_is_refused_and_one_after_it_works():
    (params, bound, ours), (twin, twin_bound, other) = pair()
    set_grads(params, bound, 0)
    set_grads(twin, twin_bound, 0)
    before = copies(params)
    with pytest.raises(RuntimeError, match="take one step that is not captured first"):
        captured(ours)
    torch.cuda.synchronize()
    assert equal(params, before)
    for _ in range(2):
        ours.step()
        other.step()
    captured(ours).replay()
    other.step()
    assert_close(params, twin)


def test_a_graph_reads_its_own_gradients_after_an_eager_step_with_others():
    """Capture with gradients at new addresses, then an eager step with others before the first replay."""
    (params, bound, ours), (twin, twin_bound, other) = pair()
    kept = []
    for step in (0, 1):
        set_grads(params, bound, step)
        kept.append([p.grad for p in params])
        if step == 0:
            ours.step()
    graph = captured(ours)  # of the gradients of step 1
    set_grads(params, bound, 2)
    kept.append([p.grad for p in params])
    ours.step()
    graph.replay()
    graph.replay()
    for step in (0, 2, 1, 1):
        set_grads(twin, twin_bound, step)
        other.step()
    assert_close(params, twin)


def test_a_graph_replays_after_eager_steps_with_gradients_that_move():
    (params, bound, ours), (twin, twin_bound, other) = pair()
    set_grads(params, bound, 0)
    fixed = [p.grad for p in params]
    ours.step()
    graph = captured(ours)
    order, kept = [0], []
    for step in range(1, 12):  # more than the ring of tables is deep
        set_grads(params, bound, step)
        kept.append([p.grad for p in params])
        ours.step()
        order.append(step)
        if step % 3 == 0:
            graph.replay()
            order.append(0)
    assert all(not torch.equal(a, b) for a, b in zip(fixed, kept[0], strict=True))
    for step in order:
        set_grads(twin, twin_bound, step)
        other.step()
    assert_close(params, twin)


def test_two_graphs_of_one_optimizer_read_each_its_own_gradients():
    (params, bound, ours), (twin, twin_bound, other) = pair()
    set_grads(params, bound, 0)
    ours.step()
    graphs, kept = [], []
    for step in (1, 2):
        set_grads(params, bound, step)
        kept.append([p.grad for p in params])
        graphs.append(captured(ours))
    for turn in (1, 0, 0, 1):
        graphs[turn].replay()
    for step in (0, 2, 1, 1, 2):
        set_grads(twin, twin_bound, step)
        other.step()
    assert_close(params, twin)


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"moment_dtype": torch.bfloat16}, {"moment_dtype": "8bit"},
                                     {"master": "stochastic"}], ids=str)
def test_a_graph_of_every_precision_is_the_eager_step(options):
    (params, bound, ours), (twin, twin_bound, other) = pair(torch.bfloat16, **options)
    set_grads(params, bound, 0)
    set_grads(twin, twin_bound, 0)
    ours.step()
    other.step()
    graph = captured(ours)
    for step in range(1, 4):
        refill_grads(params, bound, step)
        refill_grads(twin, twin_bound, step)
        graph.replay()
        other.step()
    assert equal(params, twin)
    for a, b in zip(params, twin, strict=True):
        assert all(torch.equal(ours.state[a][name], value) for name, value in other.state[b].items())
