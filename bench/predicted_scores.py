"""Predictions of scoring, which reads every weight once and a few tiles twice."""

from __future__ import annotations

from typing import NamedTuple

from bench.h100 import (
    CLOCK, COPY, ISSUES, L2, LAUNCH, MEASURED, SMALL_PRODUCTS, SMS, compared, header, on_gpu, paragraph, whole,
)
from bench.shapes import SHAPES, Shape

# SASS instructions of sm_90 for a pair of bf16 weights: of the first read by metrics, of the second read.
FIRST_READ, SECOND_READ = {"pad": 19.5, "all metrics": 32.1}, 15  # python -m tests.compiled.instructions
TILE, STATISTICS = 2048, 72  # pairs of a tile of stored weights; bytes of its row of statistics
# Share of tiles read twice: the mean of simulated heads of an 8B model; of SmolLM2 that of a pair, which has 54 tiles a
# head; of W's tiles that of the same pair (bench/results/score.csv).
LISTED, LISTED_SMALL, LISTED_PROJECTION = 0.12, 0.42, 0.32
HOST = 2.5  # ms, `python -m tests.scoring.host_time`
# `projection` on Hopper. Of W: rows of a tile and of a program, instructions for an element of the first pass (see
# above). Of group products: rows and columns of a program, the part of d that it takes at a time, its warps, and the
# instructions of each for that part.
TILE_ROWS, ROWS, FORMED = 16, 64, {"pad": 51.6, "all metrics": 64.7}
BLOCK, D_BLOCK, WARPS, ROUND = 64, 32, 4, 634
PIECES, WEIGHT, CHANGE = 3, 1, 2  # bfloat16 pieces of a product, of a bf16 weight, of a difference of two


def issued(pairs: float, instructions: float) -> float:
    """Seconds to issue so many instructions of a thread for each pair, 32 threads at once."""
    return pairs * instructions / 32 / (SMS * ISSUES * CLOCK)


def read_once(shape: Shape, metrics: str, listed: float) -> float:
    """Seconds of the three kernels over q/k/v of a bf16 pair."""
    stored, read = stored_pairs(shape), pairs_of_heads(shape)
    first = max(4 * stored / COPY, issued(stored, FIRST_READ[metrics])) + STATISTICS * stored / TILE / COPY
    between = 2 * STATISTICS * read / TILE / L2
    second = listed * max(4 * read / COPY, issued(read, SECOND_READ))
    return first + between + second + 3 * LAUNCH


def stored_pairs(shape: Shape) -> int:
    return shape.layers * shape.hidden * shape.head_dim * (shape.heads + 2 * shape.groups)


def pairs_of_heads(shape: Shape) -> int:
    """k and v count once for each head that reads them."""
    return shape.layers * shape.hidden * shape.head_dim * 3 * shape.heads


def scores(rows: list[dict[str, str]]) -> list[str]:
    pad, every = FIRST_READ.values()
    lines = paragraph(f"""
        **Scoring q/k/v** of a bf16 pair, one read of the weights and a second read of the tiles that need it. First
        kernel: all stored weights of both models at {COPY / 1e12} TB/s; beside it the time of its instructions, {pad}
        for each pair of weights for `pad`, {every} for all metrics (compiled for sm_90); the larger counts. It writes
        {STATISTICS} bytes of statistics for each tile of {TILE:,} pairs. Second kernel: every head reads those of its
        tiles twice, from L2. Third kernel: {LISTED:.0%} of the tiles of every head, again the larger of bytes and
        {SECOND_READ} instructions for each pair; k and v count for each head that reads them. The share is the mean of
        simulated heads of an 8B model. Heads of few tiles have a larger share: of SmolLM2-135M, whose heads have 54
        tiles, {LISTED_SMALL:.0%} is taken, which its task model on short sums had (`bench/results/score.csv`). Three
        launches. ms of the call: four more for the upload of the tables, a fill, a sum and the download. ms, all tiles:
        the kernels if every tile is read twice. `score_heads` adds its host's time: the function under it took
        {HOST} ms of one thread of a shared CPU for Llama-3.1-8B, with launches that do nothing (`bench/results/host_time.csv`).
        Measured: kernels alone; `score_heads`, qkv.""")
    lines += header("model", "metrics", "GB of one read", "ms one read", "ms of its instructions", "GB read twice",
                    "ms of kernels", MEASURED, "ms, all tiles", "ms of the call", "ms `score_heads` measured")
    for shape in SHAPES.values():
        stored, read = stored_pairs(shape), pairs_of_heads(shape)
        listed = LISTED_SMALL if shape.name == "SmolLM2-135M" else LISTED
        for metrics, instructions in FIRST_READ.items():
            ms = read_once(shape, metrics, listed) * 1e3
            found = on_gpu(rows, f"alps_kernels {metrics} qkv, kernels alone", shape.name, whole(shape))
            whole_call = "score_heads, qkv" + (", all metrics" if metrics != "pad" else "")
            lines.append(
                f"| {shape.name} | {metrics} | {4 * stored / 1e9:.2f} | {4 * stored / COPY * 1e3:.3f} "
                f"| {issued(stored, instructions) * 1e3:.3f} | {4 * listed * read / 1e9:.2f} | {ms:.3f} "
                f"| {compared(ms, found, ('qkv', shape.name, metrics))} | {read_once(shape, metrics, 1) * 1e3:.3f} "
                f"| {ms + 4 * LAUNCH * 1e3:.3f} | {on_gpu(rows, whole_call, shape.name, whole(shape))} |")
    return [*lines, ""]


class Bounds(NamedTuple):
    """Seconds of a kernel if nothing but its FLOPs, reads from L2, reads of memory or instructions counted."""

    FLOPs: float
    L2: float
    memory: float
    instructions: float


def of_pieces(left: int, right: int) -> int:
    """Products of bf16 pieces that a product of so many takes: of pieces i and j if i + j < PIECES."""
    return sum(i + j < PIECES for i in range(left) for j in range(right))


def group_products(shape: Shape) -> Bounds:
    """M_B = k_B v_B^T and dM = dk v_T^T + k_B dv^T of every group, in blocks of BLOCK x BLOCK."""
    groups, d, size = shape.layers * shape.groups, shape.hidden, shape.head_dim
    products = of_pieces(WEIGHT, WEIGHT) + of_pieces(CHANGE, WEIGHT) + of_pieces(WEIGHT, CHANGE)
    programs = groups * (size // BLOCK) ** 2
    stored = groups * 2 * PIECES * size * size * 2
    rounds = -(-programs // SMS) * -(-d // D_BLOCK)  # of the SM that has most programs
    return Bounds(groups * products * 2 * d * size * size / SMALL_PRODUCTS, programs * 2 * BLOCK * d * 2 * 2 / L2,
                  (groups * 2 * size * d * 2 * 2 + stored) / COPY, rounds * WARPS * ROUND / (ISSUES * CLOCK))


def formed(shape: Shape, metrics: str) -> Bounds:
    """W_h = q_B^T M_B and its change dq^T M_B + q_T^T dM of every head, ROWS rows a program."""
    heads, d, size = shape.layers * shape.heads, shape.hidden, shape.head_dim
    products = of_pieces(WEIGHT, PIECES) + of_pieces(CHANGE, PIECES) + of_pieces(WEIGHT, PIECES)
    q = heads * 2 * size * d * 2
    pieces = heads * -(-d // ROWS) * 2 * PIECES * size * size * 2
    return Bounds(heads * products * 2 * d * size * size / SMALL_PRODUCTS, (pieces + q) / L2, q / COPY,
                  issued(heads * d * size, FORMED[metrics]))


def projection_ms(shape: Shape, metrics: str, overlapped: bool) -> float:
    """Milliseconds of the four kernels: the largest bound of each; not overlapped: instructions behind the others."""
    tiles = shape.layers * shape.heads * -(-shape.hidden // TILE_ROWS)
    groups, first = (max(bounds) if overlapped else max(bounds[:3]) + bounds.instructions
                     for bounds in (group_products(shape), formed(shape, metrics)))
    statistics = STATISTICS * tiles * (1 / COPY + 2 / L2)
    return (groups + first * (1 + LISTED_PROJECTION) + statistics + 4 * LAUNCH) * 1e3


def projections(rows: list[dict[str, str]]) -> list[str]:
    """W_h = q_h^T k_g v_g^T: group products, all tiles of W once, those that are listed twice."""
    goal = SHAPES["Llama-3.1-8B"]
    ms = {(metrics, overlapped): f"{projection_ms(goal, metrics, overlapped):.1f}"
          for metrics in FORMED for overlapped in (True, False)}
    flops, l2, *_ = (f"{seconds * 1e3:.1f}" for seconds in formed(goal, "pad"))
    lines = paragraph(f"""
        **Scoring `projection`** of a bf16 pair, four kernels; all but the models' names are ms. Group products: 5
        products of bfloat16 pieces (1 for M_B, 4 for dM) of 2 x d_k x d x d_v FLOPs a group. A program forms a block of
        {BLOCK} x {BLOCK}; it reads its rows of k and v of both models from L2, and issues {ROUND} instructions in each
        of {WARPS} warps for every {D_BLOCK} of d. First pass: 11 products of pieces (3 for W, 8 for its change) of
        2 x d x d_k x d_v FLOPs a head. A program forms {ROWS} rows; it reads 2 x {PIECES} x d_k x d_v pieces of 2 bytes
        and its part of q of both models from L2, and issues {FORMED["pad"]} instructions for an element of W for
        `pad`, {FORMED["all metrics"]} for all metrics. Memory: one read of k, v and q of both models. Instructions
        are those of code compiled for sm_90, d_k = d_v = 128. Then the statistics, {STATISTICS} bytes for a tile of
        {TILE_ROWS} rows, as above; and the second pass, which takes {LISTED_PROJECTION:.0%} of the first: so many
        tiles of SmolLM2-135M and a task model of it were listed (`bench/results/score.csv`), and {ROWS} rows of
        listed tiles are one product, wherever they lie. Four launches. Kernels: of each kernel the largest of its
        times, which is right if everything overlaps. In turn: instructions behind the largest of the others; an SM
        has two programs of the first pass, and one may issue while the other multiplies. The goal for Llama-3.1-8B
        is 5 ms. The prediction is {ms["pad", True]} ms for `pad` and {ms["all metrics", True]} for all metrics, in
        turn {ms["pad", False]} and {ms["all metrics", False]}. Reads from L2 bound the first pass ({l2} ms), and
        FLOPs are close ({flops}); {2 * ROWS} rows a program would halve the reads of pieces, and
        `python -m bench.bench_score --tiles` measures both. Call: four launches more, as above. Measured: kernels
        alone; `score_heads` with its defaults, which has the host's time too.""")
    lines += header("model", *(f"groups, {bound}" for bound in Bounds._fields),
                    *(f"first pass, {bound}" for bound in Bounds._fields), "instructions, all metrics",
                    "kernels", MEASURED, "in turn", "call", "`score_heads` measured")
    for shape in SHAPES.values():
        bounds = *group_products(shape), *formed(shape, "pad"), formed(shape, "all metrics").instructions
        kernels = projection_ms(shape, "pad", True)
        found = on_gpu(rows, "alps_kernels pad projection, kernels alone", shape.name, whole(shape))
        lines.append(f"| {shape.name} | {' | '.join(f'{seconds * 1e3:.3f}' for seconds in bounds)} | {kernels:.3f} "
                     f"| {compared(kernels, found, ('projection', shape.name, ''))} "
                     f"| {projection_ms(shape, 'pad', False):.3f} | {kernels + 4 * LAUNCH * 1e3:.3f} "
                     f"| {on_gpu(rows, 'score_heads, defaults', shape.name, whole(shape))} |")
    return [*lines, ""]
