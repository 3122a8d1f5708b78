"""Scoring: ours beside the released algorithm, in one run on the same device and cores.

    python -m bench.bench_score [--shape NAME ...] [--layers N]

The released algorithm: softmax in float32, then SciPy's wasserstein_distance over the element's
position in [0, 1], head after head. It runs on the CPU whatever the device.
"""

from __future__ import annotations

import argparse
import time
from importlib.util import find_spec

import torch

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from bench.common import copy_bandwidth, gate, measure, table, write_rows
from bench.shapes import SHAPES, Shape


def layer_of(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> tuple[Segment, Segment, Segment]:
    """q, k and v of one layer of a random base and a task 1e-3 away from it."""
    generator = torch.Generator(device).manual_seed(seed)
    group = tuple(h // (shape.heads // shape.groups) for h in range(shape.heads))
    segments = []
    for n, index in ((shape.heads, tuple(range(shape.heads))), (shape.groups, group), (shape.groups, group)):
        base = 0.02 * torch.randn(n, shape.head_dim, shape.hidden, generator=generator, device=device)
        task = base + 1e-3 * torch.randn(base.shape, generator=generator, device=device)
        segments.append(Segment(base.to(dtype), task.to(dtype), index))
    return tuple(segments)


def released(layer: tuple[Segment, ...], head: int) -> float:
    """The published scoring of one head, as its authors' code computes it, with the right k and v."""
    import numpy as np
    from scipy.stats import wasserstein_distance

    p, q = (torch.softmax(torch.cat([getattr(s, side)[s.index[head]].flatten().float() for s in layer]), 0).cpu().numpy()
            for side in ("base", "task"))
    positions = np.arange(len(p)) / (len(p) - 1)
    return wasserstein_distance(positions, positions, p, q)


def run(shape: Shape, n_layers: int, n_released: int = 3) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layers = [layer_of(shape, device, dtype, seed) for seed in range(n_layers)]
    heads = n_layers * shape.heads

    ours = head_delta(layers[:1], ["pad"])["pad"]
    slow = None
    if find_spec("scipy"):
        released(layers[0], 0)  # imports SciPy: not the algorithm's time
        start = time.perf_counter()
        truth = [released(layers[0], h) for h in range(min(n_released, shape.heads))]
        slow = (time.perf_counter() - start) * 1e3 / len(truth) * heads
        named, bound = "the released definition", 1e-3  # their softmax in float32 is itself off by up to 7e-4
    else:
        wide = [tuple(Segment(s.base.double(), s.task.double(), s.index) for s in layers[0])]
        truth, named, bound = head_delta(wide, ["pad"])["pad"].tolist(), "float64", 1.5e-5
    worst = max(abs(float(ours[h]) / value - 1) for h, value in enumerate(truth))
    gate(f"pad against {named}, {shape.name}", worst < bound, f"largest relative difference {worst:.1e}")

    stored = sum(side.numel() * side.element_size() for layer in layers for s in layer for side in (s.base, s.task))
    bandwidth = copy_bandwidth()
    case = f"{shape.name} q/k/v, {n_layers} of {shape.layers} layers, {heads} heads, {str(dtype).removeprefix('torch.')}"
    rows = []
    for name, call in (
        ("alps_kernels pad qkv", lambda: head_delta(layers, ["pad"])),
        ("alps_kernels pad projection", lambda: head_delta_projection(layers, ["pad"])),
        ("alps_kernels all metrics qkv", lambda: head_delta(layers, [m for m in METRICS if m != "pad_values"])),
    ):
        took = measure(call, repeats=5, warmup=1)
        gbps = stored / took["median_ms"] / 1e6
        rows.append({"case": case, "rival": name, **took, "bytes": stored, "gbps": gbps, "copy_gbps": bandwidth,
                     "share": gbps / bandwidth, "ratio": slow / took["median_ms"] if slow else None,
                     "note": "bytes: one read of the weights; ratio: released / this"})
    rows.append({"case": case, "rival": "released algorithm (scipy, CPU)", "median_ms": slow, "ratio": slow and 1.0,
                 "note": f"{len(truth)} heads timed, times {heads}" if slow else "not run: scipy is not installed"})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["SmolLM2-135M", "Llama-3.1-8B"])
    parser.add_argument("--layers", type=int, help="default: all on a GPU, 3 on a CPU")
    options = parser.parse_args(argv)
    rows = []
    for name in options.shape:
        shape = SHAPES[name]
        rows += run(shape, options.layers or (shape.layers if torch.cuda.is_available() else min(3, shape.layers)))
    table(rows)
    print(write_rows("score", rows))


if __name__ == "__main__":
    main()
