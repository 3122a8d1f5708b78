"""pytest-benchmark entry points: `pytest bench/test_bench.py --benchmark-enable`.

Small shapes, for comparing commits on one machine; the figures of docs/results.md come from
`python -m bench`.
"""

import pytest
import torch

from alps_kernels.ops import head_delta, head_delta_projection
from alps_kernels.optim import HeadAdamW
from alps_kernels.slicing import head_grad
from bench import bench_grad_norm, bench_step, workloads
from bench.attention import DEVICE, attention, bound_to
from bench.baselines import OPTIONS
from bench.bench_dw import ranges_of
from bench.bench_score import layer_of
from bench.shapes import RATIOS, Shape, heads_of

SHAPE = Shape("small", 4, 576, 9, 3, 64)  # four layers of SmolLM2-135M


def run(benchmark, call):
    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    finished()  # state, tables and kernels are made by the first call
    benchmark(finished)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step(benchmark, dtype, adjacent, ratio):
    params = attention(SHAPE, SHAPE.layers, dtype)
    bound = bound_to(SHAPE, params, heads_of(SHAPE, ratio, adjacent=adjacent))
    run(benchmark, HeadAdamW(params.values(), heads=bound, **OPTIONS).step)


def test_step_with_the_gradient_norm(benchmark):
    params = attention(SHAPE, SHAPE.layers, torch.float32)
    bound = bound_to(SHAPE, params, heads_of(SHAPE, 0.1, adjacent=False))
    run(benchmark, HeadAdamW(params.values(), heads=bound, max_grad_norm=1.0, **OPTIONS).step)


@pytest.mark.parametrize("score", [head_delta, head_delta_projection])
def test_score(benchmark, score):
    layers = [layer_of(SHAPE, DEVICE, torch.float32, seed) for seed in range(SHAPE.layers)]
    run(benchmark, lambda: score(layers, ["pad"]))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "scattered"])
def test_grad_norm(benchmark, adjacent, ratio):
    params = attention(SHAPE, SHAPE.layers, torch.float32)
    bound = bound_to(SHAPE, params, heads_of(SHAPE, ratio, adjacent=adjacent))
    run(benchmark, bench_grad_norm.ours(params, bound).call)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("adjacent", [True, False], ids=["adjacent", "scattered"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_dw(benchmark, transposed, adjacent, ratio):
    cut, other = (torch.randn(512, SHAPE.hidden, device=DEVICE) for _ in range(2))
    run(benchmark, lambda: head_grad(cut, other, ranges_of(SHAPE, ratio, adjacent), transposed=transposed))


@pytest.mark.parametrize("method", ["HeadAdamW", "slice_heads + HeadAdamW"])
def test_training_step(benchmark, method):
    run(benchmark, bench_step.timed_step(workloads.smollm2(2, DEVICE, length=40), method, 0.1).call)
