"""The kernels' tables under another default device ("meta" stands for "cuda") or dtype."""

import pytest
import torch

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from tests.optim.cases import make, selection, snapshot, toy
from tests.reliability.test_default_device import assert_equal, default


@pytest.fixture(params=["meta", "bfloat16"])
def both(request):
    def compare(work):
        expected = work()
        with default(request.param):
            found = work()
        assert_equal(found, expected)

    return compare


@pytest.mark.parametrize("op, shapes, index", [
    (head_delta, [(2, 16, 48), (1, 16, 48)], [(0, 1), (0, 0)]),
    (head_delta_projection, [(2, 16, 48), (1, 16, 48), (1, 16, 48)], [(0, 1), (0, 0), (0, 0)]),
], ids=["stored", "projection"])
def test_scoring(op, shapes, index, both):
    draw = torch.Generator().manual_seed(0)
    base = [0.05 * torch.randn(shape, generator=draw) for shape in shapes]
    task = [weight + 1e-3 * torch.randn(weight.shape, generator=draw) for weight in base]
    task[0][1] += 3.0  # one head that the CPU backend takes
    layer = list(map(Segment, base, task, index))
    both(lambda: op([layer, layer], METRICS, backend="triton"))


@pytest.mark.parametrize("options", [
    {"max_grad_norm": 0.1}, {"capturable": True, "max_grad_norm": 0.1}, {"moment_dtype": "8bit"},
], ids=str)
def test_steps(options, both):
    grads, _ = toy(seed=7)

    def work():
        params, bound = toy_of(weights)
        optimizer = make(params, bound, **options)
        optimizer._backend = "triton"
        for _ in range(2):
            for name, param in params.items():
                param.grad = grads[name].detach().clone()
            optimizer.step()
        return snapshot(params), optimizer.state_dict()["state"], optimizer.grad_norm

    def toy_of(values):
        params = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
        return params, selection(params)

    weights = snapshot(toy()[0])
    both(work)
