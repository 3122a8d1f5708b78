"""The gradient norm over the selected slices: ours beside a mask and torch's norm, and a dense tensor's norm.

    python -m bench.bench_grad_norm [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The gradients of the attention weights (q, k, v, o). torch's own clipping would count the other heads'
gradients too, so the baseline multiplies by the mask first. Bytes: every selected gradient read once; the
masked baseline reads gradient and mask, writes the gradient, reads it again. On a GPU there is also a row of the
kernel alone, without the host's time and the sum of its partial sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from alps_kernels.ops import Launches, head_grad_norm
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundSelection
from bench import timing
from bench.attention import DEVICE, Selected, masks_of, sweep
from bench.common import gate
from bench.kernels import alone
from bench.timing import Timed, timed_rows


def ours(params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    optimizer = HeadAdamW(params.values(), heads=bound)
    arguments, launches = optimizer._cold(), Launches()
    return Timed(lambda: head_grad_norm(arguments.updates, launches=launches),
                 lambda: {"bytes": bound.numel * params["0.q"].element_size(), "note": "the selected slices read once"})


def kernel(params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    whole = ours(params, bound)
    return alone(whole.call, whole.facts)


def masked(params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    masks, grads = list(masks_of(params, bound).values()), [p.grad for p in params.values()]

    def call() -> Tensor:
        torch._foreach_mul_(grads, masks)
        return torch.stack(torch._foreach_norm(grads)).norm()

    size = sum(grad.numel() * grad.element_size() for grad in grads)
    return Timed(call, lambda: {"bytes": 4 * size, "note": "over all attention weights"})


def dense(bound: BoundSelection, dtype: torch.dtype) -> Timed:
    flat = torch.ones(bound.numel, dtype=dtype, device=DEVICE)
    return Timed(lambda: torch.linalg.vector_norm(flat), lambda: {"bytes": flat.numel() * flat.element_size()})


def exact(params: dict[str, nn.Parameter], bound: BoundSelection) -> float:
    blocks = [block for part in bound.params for block in part.blocks(params[part.name].grad)]
    return sum(block.double().square().sum().item() for block in blocks)**0.5


def run(case: Selected, bandwidth: float, repeats: int) -> Iterator[dict]:
    params, bound = case.params, case.bound
    found, truth = ours(params, bound).call().item(), exact(params, bound)
    gate(f"the norm, {case.name}", abs(found / truth - 1) < 1e-5, f"{found:.8g} and in float64 {truth:.8g}")
    builders = {"head_grad_norm": partial(ours, params, bound)}
    if timing.CUDA:
        builders["head_grad_norm, kernels alone"] = partial(kernel, params, bound)
    builders |= {"mask + torch norm": partial(masked, params, bound),
                 "torch norm, dense": partial(dense, bound, case.dtype)}
    return timed_rows(case.name, builders, repeats, bandwidth)


def main(argv: list[str] | None = None) -> None:
    sweep(__doc__, "grad_norm", run, argv)


if __name__ == "__main__":
    main()
