"""Scoring: ours beside the released algorithm, in one run on the same device and cores.

    python -m bench.bench_score [--shape NAME ...] [--layers N]
    python -m bench.bench_score --tiles                  # sizes of tiles and of programs (GPU)
    python -m bench.bench_score --pair BASE TASK         # share of tiles that are read twice, of two checkpoints

The released algorithm: softmax in float32, then SciPy's wasserstein_distance over the element's
position in [0, 1], head after head. It runs on the CPU whatever the device. `score_heads` is the public
function on two models in memory; the other rows are of the functions that it calls for each batch of layers.
On a GPU there are also rows of kernels alone, without the host's time (`bench.kernels`). --pair runs the kernels, on
a CPU in Triton's interpreter: set TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from alps_kernels import score_heads
from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from bench import timing
from bench.common import copy_bandwidth, gate, table, write_each
from bench.kernels import alone
from bench.shapes import SHAPES, Shape
from bench.timing import Timed, row_of, timed

# No part of a face: sizes to choose by measurement, and sums that only a benchmark looks at.
delta_op = inspect.getmodule(head_delta)
tables, projection = (inspect.getmodule(sums) for sums in (delta_op.flat_sums, delta_op.projection_sums))
ALL = [m for m in METRICS if m != "pad_values"]
FLAT_TILES, SCANS = (1024, 2048), (4, 8, 16)  # elements of a tile, programs of a head in the second pass
# Of the first pass of `projection` on Hopper: rows of a program, rows of a group's products that it takes at a time.
PROGRAMS = ((64, 32), (128, 32), (64, 16))


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


def models(shape: Shape, n_layers: int, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A base and a task model 1e-3 away from it: attention of this shape, and next to nothing else."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=32, hidden_size=shape.hidden, intermediate_size=32, num_hidden_layers=n_layers,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.groups, head_dim=shape.head_dim)
    torch.manual_seed(0)
    with torch.device(device):
        base = LlamaModel(config).to(dtype).eval()
    task = copy.deepcopy(base)
    with torch.no_grad():
        for param in task.parameters():
            param += 1e-3 * torch.randn_like(param)
    return base, task


def released(layer: tuple[Segment, ...], head: int) -> float:
    """The published scoring of one head, as its authors' code computes it, with the right k and v."""
    import numpy as np
    from scipy.stats import wasserstein_distance

    flat = (torch.cat([getattr(s, side)[s.index[head]].flatten().float() for s in layer]) for side in ("base", "task"))
    p, q = (torch.softmax(weights, 0).cpu().numpy() for weights in flat)
    positions = np.arange(len(p)) / (len(p) - 1)
    return wasserstein_distance(positions, positions, p, q)


def parity(shape: Shape, layer: tuple[Segment, ...], n_released: int) -> tuple[float | None, int]:
    """Compare `pad` of one layer with the released definition, or with float64 where SciPy is not installed.

    Returns:
        ms of the released algorithm for one head (None without SciPy), and for how many heads it was timed.
    """
    ours, slow = head_delta([layer], ["pad"])["pad"], None
    if find_spec("scipy"):
        released(layer, 0)  # imports SciPy: not the algorithm's time
        start = time.perf_counter()
        truth = [released(layer, h) for h in range(min(n_released, shape.heads))]
        slow = (time.perf_counter() - start) * 1e3 / len(truth)
        named, bound = "the released definition", 1e-3  # their softmax in float32 is itself off by up to 7e-4
    else:
        wide = [tuple(Segment(s.base.double(), s.task.double(), s.index) for s in layer)]
        truth, named, bound = head_delta(wide, ["pad"])["pad"].tolist(), "float64", 1.5e-5
    worst = max(abs(float(ours[h]) / value - 1) for h, value in enumerate(truth))
    gate(f"pad against {named}, {shape.name}", worst < bound, f"largest relative difference {worst:.1e}")
    return slow, len(truth)


def builders_of(shape: Shape, n_layers: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Timed]]:
    """The functions of `alps_kernels.ops` on one set of layers, the public function on one pair of models.

    Each set is made when the first of its rows is built, and the layers go before the models are there.
    """
    made: dict[str, object] = {}

    def layers() -> list:
        if "layers" not in made:
            made["layers"] = [layer_of(shape, device, dtype, seed) for seed in range(n_layers)]
        return made["layers"]

    def pair() -> tuple[nn.Module, nn.Module]:
        if timing.CUDA:
            made.pop("layers", None)
        if "pair" not in made:
            made["pair"] = models(shape, n_layers, device, dtype)
        return made["pair"]

    size = sum(n * shape.head_dim * shape.hidden for n in (shape.heads, shape.groups, shape.groups))
    stored = 2 * n_layers * size * dtype.itemsize

    def facts() -> dict:
        return {"bytes": stored}

    def op(function: Callable, metrics: list[str]) -> Timed:
        given = layers()
        return Timed(lambda: function(given, metrics), facts)

    def public(**options) -> Timed:
        base, task = pair()
        return Timed(lambda: score_heads(base, task, **options), facts)

    def kernels(function: Callable, metrics: list[str]) -> Timed:
        return alone(op(function, metrics).call, facts)

    calls = {"pad projection": (head_delta_projection, ["pad"]), "pad qkv": (head_delta, ["pad"]),
             "all metrics qkv": (head_delta, ALL)}
    builders: dict[str, Callable[[], Timed]] = {}
    for name, call in calls.items():
        builders[f"alps_kernels {name}"] = partial(op, *call)
        if timing.CUDA:
            builders[f"alps_kernels {name}, kernels alone"] = partial(kernels, *call)
    return builders | {"score_heads, defaults": public, "score_heads, qkv": partial(public, representation="qkv"),
                       "score_heads, qkv, all metrics": partial(public, representation="qkv", metric=ALL)}


def run(shape: Shape, n_layers: int, n_released: int = 3) -> Iterator[dict]:
    """Rows of one shape, each as soon as it was measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    heads = n_layers * shape.heads
    slow, n_timed = parity(shape, layer_of(shape, device, dtype, 0), n_released)
    slow = slow and slow * heads
    bandwidth = copy_bandwidth()
    case = f"{shape.name} q/k/v, {n_layers} of {shape.layers} layers, {heads} heads, {str(dtype)[6:]}"
    for name, facts in timed(builders_of(shape, n_layers, device, dtype), repeats=5):
        row = row_of(case, name, facts, bandwidth)
        if "median_ms" in row:
            row |= {"ratio": slow / row["median_ms"] if slow else None,
                    "note": "bytes: one read of the weights; ratio: released / this"}
        yield row
    released_row = {"median_ms": slow, "ratio": 1.0, "note": f"{n_timed} heads timed, times {heads}"} if slow else {
        "note": "not run: scipy is not installed"}
    yield {"case": case, "rival": "released algorithm (scipy, CPU)", **released_row}


def tiles(shape: Shape, n_layers: int, device: str, dtype: torch.dtype) -> Iterator[dict]:
    """Rows of the kernels alone, `pad`: of `projection` by size of a program of the first pass, on Hopper; of q/k/v
    by elements of a tile and programs of a head in the second pass."""
    layers, own = [layer_of(shape, device, dtype, seed) for seed in range(n_layers)], projection._options

    def program(rows: int, k_block: int) -> dict:
        def options(*given) -> tuple[dict[str, int], ...]:
            form, stats, scan = own(*given)
            # four warps multiply 64 rows together
            sizes = {"RUNS": rows // projection.TILE_ROWS, "K_BLOCK": k_block, "num_warps": rows // 16}
            return form, stats | sizes, scan

        return {"_options": options}

    def pad(function: Callable) -> Tensor:
        return function(layers, ["pad"], backend="triton")["pad"]

    as_is = cache(pad)

    def kernels(function: Callable, name: str, module: object, sizes: dict) -> Timed:
        expected = as_is(function)
        with mock.patch.multiple(module, **sizes):
            off = float((pad(function) / expected - 1).abs().max())
            gate(f"pad, {name}, {shape.name}", off < 1e-6, f"off by {off:.1e}")
            return alone(partial(pad, function))

    of_projection = {f"{rows} rows and {k_block} of d_k": (head_delta_projection, projection, program(rows, k_block))
                     for rows, k_block in PROGRAMS if projection.is_hopper(torch.device(device))}
    of_stored = {
        f"tiles of {tile}, {scans} programs of a head": (head_delta, tables, {"FLAT_TILE": tile, "SCANS": scans})
        for tile, scans in product(FLAT_TILES, SCANS)}
    for named, found in (("projection by program", of_projection), ("q/k/v by tile", of_stored)):
        builders = {f"{name}, kernels alone": partial(kernels, function, name, module, sizes)
                    for name, (function, module, sizes) in found.items()}
        case = f"{shape.name} pad of {named}, {n_layers} of {shape.layers} layers, {str(dtype)[6:]}"
        yield from timing.timed_rows(case, builders, repeats=5)


def listed(base: object, task: object, **options: object) -> tuple[Tensor, Tensor]:
    """Share of each head's tiles that the second pass reads, and the scores: by the kernels, whatever the device.

    Args:
        options: of `score_heads`.
    """
    shares = []

    def noting(function: Callable, tiles_of: Callable[[tuple], int]) -> Callable:
        def note(layers: list, *args):
            # As on a GPU, whose memory is aligned: a file's tensors need not be.
            layers = [tuple(Segment(s.base.clone(), s.task.clone(), s.index) for s in layer) for layer in layers]
            sums = function(layers, *args)
            of_heads = [tiles_of(layer) for layer in layers for _ in layer[0].index]
            shares.append(sums.s.listed / torch.tensor(of_heads, dtype=torch.float64))
            return sums

        return note

    def stored(layer: tuple) -> int:
        return sum(tables._row(tables._kind(s), 0).tiles for s in layer)

    def of_product(layer: tuple) -> int:
        return -(-layer[0].base.shape[2] // projection.TILE_ROWS)

    with (mock.patch.object(delta_op, "flat_sums", noting(tables.flat_sums, stored)),
          mock.patch.object(delta_op, "projection_sums", noting(projection.projection_sums, of_product)),
          mock.patch.object(delta_op, "runs_kernels", lambda tensor: True)):
        scores = score_heads(base, task, **options)
    return torch.cat(shares), scores.tensor


def listed_of(base: Path, task: Path, n_layers: int | None) -> Iterator[dict]:
    """Rows of the shares of two checkpoints: of n layers, spread over the model, or of all."""
    layers = range(json.loads((base / "config.json").read_text())["num_hidden_layers"])
    n = min(n_layers or len(layers), len(layers))
    chosen = [layers[(2 * i + 1) * len(layers) // (2 * n)] for i in range(n)]
    for representation in ("qkv", "projection"):
        options = {"representation": representation, "attention": chosen}
        shares, found = listed(base, task, device="cuda" if timing.CUDA else "cpu", **options)
        off = float((found / score_heads(base, task, **options).tensor - 1).abs().max())
        gate(f"pad of {representation}, kernels against the CPU", off < 1.5e-5, f"off by {off:.1e}")
        share = float(shares.mean())
        yield {"case": f"tiles read twice, {base.name} and {task.name}, {n} of {len(layers)} layers",
               "rival": representation, "share": share, "note": f"{share:.1%} of the tiles of {len(shares)} heads, "
               f"{float(shares.min()):.0%} to {float(shares.max()):.0%} of one head"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["Llama-3.1-8B", "SmolLM2-135M"] if cuda else [
        "SmolLM2-135M", "Llama-3.1-8B"])
    parser.add_argument("--layers", type=int, help="default: all on a GPU, 3 on a CPU; with --pair: all")
    parser.add_argument("--tiles", action="store_true", help="the kernels of Llama-3.1-8B by sizes of tiles and of programs")
    parser.add_argument("--pair", nargs=2, type=Path, metavar=("BASE", "TASK"), help="two checkpoint folders")
    options = parser.parse_args(argv)
    if options.pair:
        rows, path = write_each("score", listed_of(*options.pair, options.layers))
        print(path)
        return
    lost = []
    for shape in [SHAPES["Llama-3.1-8B"]] if options.tiles else map(SHAPES.get, options.shape):
        n_layers = min(options.layers or (shape.layers if cuda else 3), shape.layers)
        found = tiles(shape, n_layers, "cuda", torch.bfloat16) if options.tiles else run(shape, n_layers)
        rows, path = write_each("score", found)
        table(rows)
        ours = [row for row in rows if not row["rival"].startswith("released")]
        lost += [f"{row['rival']}: {row['note']}" for row in ours if "median_ms" not in row]
        print(path)
    if lost:
        raise SystemExit("\n".join(["no time of ours", *lost]))


if __name__ == "__main__":
    main()
