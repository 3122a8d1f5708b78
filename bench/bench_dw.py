"""The weight gradient of selected heads: ours beside the whole dW, with and without a mask.

    python -m bench.bench_dw [--shape NAME ...] [--ratio R ...] [--tokens N] [--dtype float32|bfloat16]

One layer's q (heads are rows of dW = dY^T X) and o (heads are columns). Scattered heads are runs of
their own: all of them gathered into one GEMM, or one GEMM for every run; `head_grad` chooses. Bytes:
both factors' selected parts read once and the result written, the least that any of them can move; what
bounds these is FLOPs, so the note gives their rate.
"""

from __future__ import annotations

import argparse
import random
from functools import partial

import torch
from torch import Tensor

from alps_kernels.slicing import head_grad, select_columns
from alps_kernels.tensors import merge
from bench.common import copy_bandwidth, gate, table, write_rows
from bench.shapes import RATIOS, SHAPES, Shape
from bench.timing import Timed, rows_of, time_each

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Ranges = tuple[tuple[int, int], ...]


def ranges_of(shape: Shape, ratio: float, adjacent: bool) -> Ranges:
    """Half-open ranges of the selected heads of one layer."""
    n = max(1, round(ratio * shape.heads))
    heads = range(n) if adjacent else random.Random(0).sample(range(shape.heads), n)
    return merge((head * shape.head_dim, (head + 1) * shape.head_dim) for head in heads)


def run_by_run(cut: Tensor, other: Tensor, ranges: Ranges, transposed: bool) -> Tensor:
    parts = [cut[:, start:stop] for start, stop in ranges]
    return torch.cat([other.t() @ part if transposed else part.t() @ other for part in parts], int(transposed))


def gathered(cut: Tensor, other: Tensor, ranges: Ranges, transposed: bool) -> Tensor:
    part = select_columns(cut, ranges)
    return other.t() @ part if transposed else part.t() @ other


def whole(cut: Tensor, other: Tensor, mask: Tensor | None, transposed: bool) -> Tensor:
    grad = other.t() @ cut if transposed else cut.t() @ other
    return grad if mask is None else grad.mul_(mask)


def run(shape: Shape, part: str, ratio: float, adjacent: bool, tokens: int, dtype: torch.dtype, bandwidth: float,
        repeats: int) -> list[dict]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    width, transposed, ranges = shape.heads * shape.head_dim, part == "o", ranges_of(shape, ratio, adjacent)
    # q: cut is dY [tokens, heads * head_dim], other is X [tokens, hidden]; o: cut is X, other is dY.
    cut = torch.randn(tokens, width, generator=generator, device=DEVICE).to(dtype)
    other = torch.randn(tokens, shape.hidden, generator=generator, device=DEVICE).to(dtype)
    n_sel = sum(stop - start for start, stop in ranges)
    case = (f"{shape.name} {part}, one layer, {tokens} tokens, {ratio:.0%} of heads "
            f"{'adjacent' if adjacent else 'scattered'}, {n_sel} of {width}, {str(dtype)[6:]}")

    found = head_grad(cut, other, ranges, transposed=transposed).double()
    exact = whole(cut.double(), other.double(), None, transposed)
    truth = torch.cat([exact.narrow(int(transposed), start, stop - start) for start, stop in ranges], int(transposed))
    off = ((found - truth).abs().max() / truth.abs().max()).item()
    gate(f"the gradient, {case}", off < (1e-5 if dtype == torch.float32 else 1e-2), f"{off:.1e} of its largest element")

    def facts(n: int) -> dict:
        return {"bytes": (tokens * n + tokens * shape.hidden + n * shape.hidden) * cut.element_size(),
                "flop": 2 * tokens * n * shape.hidden}

    mask = torch.zeros((shape.hidden, width) if transposed else (width, shape.hidden), dtype=dtype, device=DEVICE)
    for start, stop in ranges:
        mask.narrow(int(transposed), start, stop - start).fill_(1)
    calls = {"head_grad": (head_grad, n_sel)}
    if len(ranges) > 1:
        calls |= {"gathered, one GEMM": (gathered, n_sel), "one GEMM a run": (run_by_run, n_sel)}
    builders = {name: partial(Timed, partial(call, cut, other, ranges, transposed=transposed), partial(facts, n))
                for name, (call, n) in calls.items()}
    builders |= {"whole dW": partial(Timed, partial(whole, cut, other, None, transposed), partial(facts, width)),
                 "whole dW + mask": partial(Timed, partial(whole, cut, other, mask, transposed), partial(facts, width))}
    rows = rows_of(case, time_each(builders, repeats), bandwidth)
    for row in rows:
        if (flop := row.pop("flop", None)) is None:
            continue  # lost, and its note says why
        row["note"] = f"{flop / 1e9:.2f} GFLOP at {flop / row['median_ms'] / 1e6:,.1f} GFLOP/s"
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = DEVICE == "cuda"
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["Llama-3.1-8B"] if cuda else ["SmolLM2-135M"])
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--tokens", type=int, default=8192 if cuda else 512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    bandwidth, dtype = copy_bandwidth(), getattr(torch, args.dtype)
    for shape in map(SHAPES.get, args.shape):
        for part in ("q", "o"):
            for ratio in args.ratio:
                one = ratio == 1 or round(ratio * shape.heads) <= 1
                for adjacent in (True,) if one else (False, True):
                    timed = run(shape, part, ratio, adjacent, args.tokens, dtype, bandwidth, args.repeats)
                    table(timed, ("rival", "median_ms", "ratio", "peak_mib", "launches", "note"))
                    path = write_rows("dw", timed)
    print(path)


if __name__ == "__main__":
    main()
