"""The optimizer step: ours beside torch's AdamW with a gradient mask, and on a dense tensor of the same size.

    python -m bench.bench_adamw [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The attention weights (q, k, v, o) of a model's shape; selected heads scattered over the model or
the first ones of every layer; a key/value group trains when one of its query heads does. The
mask rival is what users write today: the gradient times a mask, then torch.optim.AdamW over all
attention weights (which also decays what is frozen).
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import nn

from alps_kernels.binding import BoundParam, BoundSelection, merge
from alps_kernels.optimizer import HeadAdamW
from alps_kernels.selection import HeadSelection
from bench.common import copy_bandwidth, gate, measure, table, write_rows
from bench.shapes import RATIOS, SHAPES, Shape, heads_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"lr": 2e-5, "weight_decay": 0.1}


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


def run(shape: Shape, n_layers: int, ratio: float, adjacent: bool, dtype: torch.dtype, bandwidth: float) -> list[dict]:
    params = attention(shape, n_layers, dtype)
    few = Shape(shape.name, n_layers, shape.hidden, shape.heads, shape.groups, shape.head_dim)
    bound = bound_to(shape, params, heads_of(few, ratio, adjacent=adjacent))
    size = params["0.q"].element_size()
    case = (f"{shape.name} q/k/v/o, {n_layers} of {shape.layers} layers, {ratio:.0%} of heads "
            f"{'adjacent' if adjacent else 'scattered'}, {bound.numel / 1e6:.1f}M elements, {str(dtype)[6:]}")
    rows = []

    def row(rival: str, step, optimizer, numel: int, per_element: int, note: str = "") -> None:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = measure(step, repeats=7)
        gbps = numel * per_element / took["median_ms"] / 1e6
        state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
        peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else ""
        rows.append({"case": case, "rival": rival, **took, "bytes": numel * per_element, "gbps": gbps,
                     "copy_gbps": bandwidth, "share": gbps / bandwidth, "peak_mib": peak,
                     "ratio": took["median_ms"] / rows[0]["median_ms"] if rows else 1.0,
                     "launches": sum(len(p.tiles) for p in optimizer._plans.values()) if hasattr(optimizer, "_plans") else "",
                     "note": f"{per_element} B an element, state {state / 2**20:.1f} MiB{note}; ratio: this / ours"})

    # The first row is what every ratio refers to: the default precision.
    for master in ("split",) if dtype == torch.float32 else ("split", "stochastic", None):
        ours = HeadAdamW(params.values(), heads=bound, master=master, **OPTIONS)
        name = "HeadAdamW" if dtype == torch.float32 else f"HeadAdamW master={master}"
        row(name, ours.step, ours, bound.numel, 3 * size + 16 + (4 if master == "split" and size == 2 else 0))
        del ours
    masks = masks_of(params, bound)
    total = sum(p.numel() for p in params.values())
    for kind in ("foreach", "fused"):
        theirs = torch.optim.AdamW(params.values(), **OPTIONS, **{kind: True})

        def masked(theirs=theirs):
            torch._foreach_mul_([p.grad for p in params.values()], list(masks.values()))
            theirs.step()

        row(f"torch AdamW {kind} + mask", masked, theirs, total, (3 + 4 + 3) * size, ", over all attention weights")
        del theirs
    del masks
    flat = nn.Parameter(torch.zeros(bound.numel, dtype=dtype, device=DEVICE))
    flat.grad = torch.ones_like(flat)
    dense = torch.optim.AdamW([flat], fused=True, **OPTIONS)
    row("torch AdamW fused, dense tensor of as many elements", dense.step, dense, bound.numel, (3 + 4) * size,
        ", moments in the parameter's dtype")
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = DEVICE == "cuda"
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["Llama-3.1-8B"] if cuda else ["SmolLM2-135M"])
    parser.add_argument("--ratio", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--layers", type=int, help="default: all on a GPU and of SmolLM2, else 4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    args = parser.parse_args(argv)
    parity()
    bandwidth, rows = copy_bandwidth(), []
    for shape in map(SHAPES.get, args.shape):
        n_layers = args.layers or (shape.layers if cuda or shape.hidden < 1000 else 4)
        for ratio in args.ratio:
            for adjacent in (False, True) if ratio < 1 else (True,):
                timed = run(shape, min(n_layers, shape.layers), ratio, adjacent, getattr(torch, args.dtype), bandwidth)
                print(timed[0]["case"])
                table(timed, ("rival", "median_ms", "gbps", "share", "ratio"))
                rows += timed
    print(write_rows("adamw", rows))


if __name__ == "__main__":
    main()
