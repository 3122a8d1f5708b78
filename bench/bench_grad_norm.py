"""The gradient norm over the selected slices: ours beside a mask and torch's norm, and a dense tensor's norm.

    python -m bench.bench_grad_norm [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The gradients of the attention weights (q, k, v, o). torch's own clipping would count the other heads'
gradients too, so the rival multiplies by the mask first. Bytes: every selected gradient read once; the
mask's rival reads gradient and mask, writes the gradient, reads it again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from alps_kernels.binding import BoundSelection
from alps_kernels.ops.head_adamw import head_grad_norm
from alps_kernels.optimizer import HeadAdamW
from bench.bench_adamw import DEVICE, attention, bound_to, masks_of
from bench.common import copy_bandwidth, gate, table, write_rows
from bench.race import Entry, race, rows_of
from bench.shapes import RATIOS, SHAPES, Shape, heads_of


def ours(params: dict[str, nn.Parameter], bound: BoundSelection) -> Entry:
    optimizer = HeadAdamW(params.values(), heads=bound)
    updates, plans = optimizer._updates(), {}
    return Entry(lambda: head_grad_norm(updates, plans=plans),
                 lambda: {"bytes": bound.numel * params["0.q"].element_size(), "note": "the selected slices read once"})


def masked(params: dict[str, nn.Parameter], bound: BoundSelection) -> Entry:
    masks, grads = list(masks_of(params, bound).values()), [p.grad for p in params.values()]

    def call() -> Tensor:
        torch._foreach_mul_(grads, masks)
        return torch.stack(torch._foreach_norm(grads)).norm()

    return Entry(call, lambda: {"bytes": 4 * sum(g.numel() * g.element_size() for g in grads), "note": "over all attention weights"})


def dense(bound: BoundSelection, dtype: torch.dtype) -> Entry:
    flat = torch.ones(bound.numel, dtype=dtype, device=DEVICE)
    return Entry(lambda: torch.linalg.vector_norm(flat), lambda: {"bytes": flat.numel() * flat.element_size()})


def exact(params: dict[str, nn.Parameter], bound: BoundSelection) -> float:
    return sum(block.double().square().sum().item() for part in bound.params for block in part.blocks(params[part.name].grad))**0.5


def run(shape: Shape, n_layers: int, ratio: float, adjacent: bool, dtype: torch.dtype, bandwidth: float, repeats: int) -> list[dict]:
    params = attention(shape, n_layers, dtype)
    bound = bound_to(shape, params, heads_of(replace(shape, layers=n_layers), ratio, adjacent=adjacent))
    case = (f"{shape.name} q/k/v/o, {n_layers} of {shape.layers} layers, {ratio:.0%} of heads "
            f"{'adjacent' if adjacent else 'scattered'}, {bound.numel / 1e6:.1f}M elements, {str(dtype)[6:]}")
    found, truth = ours(params, bound).call().item(), exact(params, bound)
    gate(f"the norm, {case}", abs(found / truth - 1) < 1e-5, f"{found:.8g} and in float64 {truth:.8g}")
    return rows_of(case, race({"head_grad_norm": partial(ours, params, bound),
                               "mask + torch norm": partial(masked, params, bound),
                               "torch norm, dense": partial(dense, bound, dtype)}, repeats), bandwidth)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = DEVICE == "cuda"
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Llama-3.1-8B"] if cuda else ["SmolLM2-135M"])
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--layers", type=int, help="default: all on a GPU and of SmolLM2, else 4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    bandwidth = copy_bandwidth()
    for shape in map(SHAPES.get, args.shape):
        n_layers = args.layers or (shape.layers if cuda or shape.hidden < 1000 else 4)
        for ratio in args.ratio:
            for adjacent in (False, True) if ratio < 1 else (True,):
                timed = run(shape, min(n_layers, shape.layers), ratio, adjacent, getattr(torch, args.dtype), bandwidth, args.repeats)
                table(timed, ("rival", "median_ms", "gbps", "share", "ratio", "peak_mib", "launches", "note"))
                path = write_rows("grad_norm", timed)
    print(path)


if __name__ == "__main__":
    main()
