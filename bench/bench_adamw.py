"""The optimizer step: ours beside torch's AdamW with a gradient mask, and others' on a dense tensor of the same size.

    python -m bench.bench_adamw [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The attention weights (q, k, v, o) of a model's shape; selected heads scattered over the model or
the first ones of every layer; a key/value group trains when one of its query heads does. The
mask rival is what users write today: the gradient times a mask, then torch.optim.AdamW over all
attention weights (which also decays what is frozen). The dense rivals get one tensor of as many
elements as are selected, which is the best that any optimizer could be given. Bytes are 3 times the
weight's size (param read and written, grad read) plus twice the state that the optimizer holds.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from alps_kernels.binding import BoundParam, BoundSelection, merge
from alps_kernels.optimizer import HeadAdamW
from alps_kernels.selection import HeadSelection
from bench.common import copy_bandwidth, gate, table, write_rows
from bench.counting import state_bytes
from bench.race import Entry, race, rows_of
from bench.rivals import OPTIONS, RIVALS, rival
from bench.shapes import RATIOS, SHAPES, Shape, heads_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = "HeadAdamW"
PRECISIONS = ({"master": "split"}, {"master": "stochastic"}, {"master": None})


def attention(shape: Shape, n_layers: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Random q, k, v [heads or groups * head_dim, hidden] and o [hidden, heads * head_dim], with gradients."""
    generator, params = torch.Generator(DEVICE).manual_seed(0), {}
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    for layer in range(n_layers):
        for part, size in (("q", (q, shape.hidden)), ("k", (kv, shape.hidden)), ("v", (kv, shape.hidden)), ("o", (shape.hidden, q))):
            param = nn.Parameter((0.02 * torch.randn(size, generator=generator, device=DEVICE)).to(dtype))
            param.grad = (1e-3 * torch.randn(size, generator=generator, device=DEVICE)).to(dtype)
            params[f"{layer}.{part}"] = param
    return params


def bound_to(shape: Shape, params: dict[str, nn.Parameter], heads: list[tuple[int, int]]) -> BoundSelection:
    """The selected heads' rows of q, their groups' rows of k and v, their columns of o."""
    ranges, size, per_group = defaultdict(list), shape.head_dim, shape.heads // shape.groups
    for layer, head in heads:
        for part, index in (("q", head), ("k", head // per_group), ("v", head // per_group), ("o", head)):
            if f"{layer}.{part}" in params:
                ranges[f"{layer}.{part}"].append((index * size, (index + 1) * size))
    parts = (BoundParam(name, params[name], int(name.endswith("o")), merge(cut)) for name, cut in ranges.items())
    return BoundSelection(HeadSelection([], []), tuple(parts), "frozen", None)


def masks_of(params: dict[str, nn.Parameter], bound: BoundSelection) -> dict[str, torch.Tensor]:
    masks = {name: torch.zeros_like(p) for name, p in params.items()}
    for part in bound.params:
        for block in part.blocks(masks[part.name]):
            block.fill_(1.0)
    return masks


def parity() -> None:
    """float32 slices against torch's AdamW on them alone, 10 steps; every other byte as it was."""
    shape = Shape("tiny", 2, 96, 6, 2, 16)
    params = attention(shape, 2, torch.float32)
    bound = bound_to(shape, params, [(0, 1), (0, 2), (1, 5)])
    before = {name: p.detach().clone() for name, p in params.items()}
    cuts = [nn.Parameter(part.cut(part.param.detach()).clone()) for part in bound.params]
    ours, theirs = HeadAdamW(params.values(), heads=bound, **OPTIONS), torch.optim.AdamW(cuts, **OPTIONS)
    for _ in range(10):
        for part, cut in zip(bound.params, cuts, strict=True):
            cut.grad = part.cut(part.param.grad)
        ours.step()
        theirs.step()
    worst = max(((part.cut(part.param.detach()) - cut).abs().max() / 2.0**-24).item()
                for part, cut in zip(bound.params, cuts, strict=True))
    masks = masks_of(params, bound)
    frozen = all(torch.equal(params[n][masks[n] == 0], before[n][masks[n] == 0]) for n in params)
    gate("the sliced step", worst <= 2 and frozen, f"largest difference {worst:.1f} x 2^-24, frozen bytes {'kept' if frozen else 'MOVED'}")


def ours(params: dict[str, nn.Parameter], bound: BoundSelection, **precision) -> Entry:
    optimizer = HeadAdamW(params.values(), heads=bound, **precision, **OPTIONS)
    return Entry(optimizer.step, lambda: moved(optimizer, bound.numel, params["0.q"].element_size()))


def masked(params: dict[str, nn.Parameter], bound: BoundSelection, kind: str) -> Entry:
    """The gradient times a mask, then torch's AdamW over all attention weights."""
    optimizer, masks = torch.optim.AdamW(params.values(), **OPTIONS, **{kind: True}), list(masks_of(params, bound).values())

    def call() -> None:
        torch._foreach_mul_([p.grad for p in params.values()], masks)
        optimizer.step()

    total = sum(p.numel() for p in params.values())
    size = params["0.q"].element_size()
    return Entry(call, lambda: moved(optimizer, total, size, 3 * size, "over all attention weights"))


def dense(name: str, bound: BoundSelection, dtype: torch.dtype) -> Entry:
    """A rival on one tensor of as many elements as are selected."""
    flat = nn.Parameter(torch.zeros(bound.numel, dtype=dtype, device=DEVICE))
    flat.grad = torch.ones_like(flat)
    optimizer = rival(name, [flat])
    return Entry(optimizer.step, lambda: moved(optimizer, flat.numel(), flat.element_size()))


def moved(optimizer: torch.optim.Optimizer, numel: int, size: int, mask: int = 0, note: str = "") -> dict:
    """Bytes a step must move: param read and written, grad read, state read and written; a mask's own on top."""
    state = state_bytes(optimizer)
    per_element = 3 * size + 2 * state / numel + mask
    return {"bytes": round(numel * per_element),
            "note": ", ".join(filter(None, (f"{per_element:.1f} B an element", note)))}


def contest(params: dict[str, nn.Parameter], bound: BoundSelection, dtype: torch.dtype) -> dict[str, Callable[[], Entry]]:
    """Ours first, the default precision above all: every ratio refers to it."""
    half = dtype != torch.float32
    entries = {OURS if precision["master"] == "split" and len(precision) == 1 else f"{OURS} {describe(precision)}":
               partial(ours, params, bound, **precision) for precision in PRECISIONS if half or precision["master"] == "split"}
    entries |= {f"torch AdamW {kind} + mask": partial(masked, params, bound, kind) for kind in ("foreach", "fused")}
    return entries | {f"{name}, dense": partial(dense, name, bound, dtype) for name in RIVALS}


def describe(precision: dict) -> str:
    return ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in precision.items())


def run(shape: Shape, n_layers: int, ratio: float, adjacent: bool, dtype: torch.dtype, bandwidth: float, repeats: int) -> list[dict]:
    params = attention(shape, n_layers, dtype)
    few = replace(shape, layers=n_layers)
    bound = bound_to(shape, params, heads_of(few, ratio, adjacent=adjacent))
    case = (f"{shape.name} q/k/v/o, {n_layers} of {shape.layers} layers, {ratio:.0%} of heads "
            f"{'adjacent' if adjacent else 'scattered'}, {bound.numel / 1e6:.1f}M elements, {str(dtype)[6:]}")
    return rows_of(case, race(contest(params, bound, dtype), repeats), bandwidth)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = DEVICE == "cuda"
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Llama-3.1-8B"] if cuda else ["SmolLM2-135M"])
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--layers", type=int, help="default: all on a GPU and of SmolLM2, else 4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    parity()
    bandwidth = copy_bandwidth()
    for shape in map(SHAPES.get, args.shape):
        n_layers = args.layers or (shape.layers if cuda or shape.hidden < 1000 else 4)
        for ratio in args.ratio:
            for adjacent in (False, True) if ratio < 1 else (True,):
                timed = run(shape, min(n_layers, shape.layers), ratio, adjacent, getattr(torch, args.dtype), bandwidth, args.repeats)
                print(timed[0]["case"])
                table(timed, ("rival", "median_ms", "gbps", "share", "ratio", "peak_mib", "launches", "note"))
                path = write_rows("adamw", timed)
    print(path)


if __name__ == "__main__":
    main()
