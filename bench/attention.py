"""The attention weights of a model's shape, a selection of its heads on them, and the sweep over both."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from alps_kernels.selection import BoundParam, BoundSelection, HeadSelection
from alps_kernels.tensors import merge
from bench.common import copy_bandwidth, table, write_each
from bench.shapes import RATIOS, SHAPES, Shape, heads_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention(shape: Shape, n_layers: int, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Random q, k, v [heads or groups * head_dim, hidden] and o [hidden, heads * head_dim], with gradients."""
    generator, params = torch.Generator(DEVICE).manual_seed(0), {}
    q, kv = shape.heads * shape.head_dim, shape.groups * shape.head_dim
    for layer in range(n_layers):
        sizes = {"q": (q, shape.hidden), "k": (kv, shape.hidden), "v": (kv, shape.hidden), "o": (shape.hidden, q)}
        for part, size in sizes.items():
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


@dataclass(frozen=True)
class Selected:
    """Attention weights with gradients, the heads of them that train, and what to call that."""

    name: str
    params: dict[str, nn.Parameter]
    bound: BoundSelection
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: Shape, n_layers: int, ratio: float, adjacent: bool, dtype: torch.dtype) -> Selected:
        params = attention(shape, n_layers, dtype)
        bound = bound_to(shape, params, heads_of(replace(shape, layers=n_layers), ratio, adjacent=adjacent))
        return cls(f"{shape.name} q/k/v/o, {n_layers} of {shape.layers} layers, {ratio:.0%} of heads "
                   f"{'adjacent' if adjacent else 'scattered'}, {bound.numel / 1e6:.1f}M elements, {str(dtype)[6:]}",
                   params, bound, dtype)


def sweep(doc: str, name: str, run: Callable[[Selected, float, int], Iterable[dict]], argv: list[str] | None,
          parity: Callable[[], None] | None = None) -> None:
    """`run` every case that the command line names; every row is written as soon as it was measured.

    Args:
        doc: the benchmark's own, for --help.
        name: of the file of rows.
        run: rows of a case, from the copy bandwidth and the number of repeats; the first is ours.
        parity: what must hold before anything is timed.

    Raises:
        SystemExit: at the end, where a case has no time of ours.
    """
    cuda = DEVICE == "cuda"
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Llama-3.1-8B"] if cuda else ["SmolLM2-135M"])
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--layers", type=int, help="default: all on a GPU and of SmolLM2, else 4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    if parity:
        parity()
    bandwidth, lost = copy_bandwidth(), []
    for shape in map(SHAPES.get, args.shape):
        n_layers = min(args.layers or (shape.layers if cuda or shape.hidden < 1000 else 4), shape.layers)
        for ratio in args.ratio:
            for adjacent in (False, True) if ratio < 1 else (True,):
                case = Selected.of(shape, n_layers, ratio, adjacent, getattr(torch, args.dtype))
                print(case.name, flush=True)
                rows, path = write_each(name, run(case, bandwidth, args.repeats))
                table(rows, ("rival", "median_ms", "gbps", "share", "ratio", "peak_mib", "launches", "note"))
                if "median_ms" not in rows[0]:
                    lost.append(f"{case.name}: {rows[0]['rival']} {rows[0].get('note', 'has no time')}")
    print(path)
    if lost:
        raise SystemExit("\n".join(["no time of ours", *lost]))
