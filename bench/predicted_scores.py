"""Predictions of scoring, which reads every weight once and a few tiles twice."""

from __future__ import annotations

from bench.h100 import (
    CLOCK, COPY, FP64, ISSUES, L2, LAUNCH, MEASURED, SMS, TF32, compared, header, on_gpu, paragraph, whole,
)
from bench.shapes import SHAPES, Shape

# SASS instructions of sm_90 for a pair of bf16 weights: of the first read by metrics, of the second read.
FIRST_READ, SECOND_READ = {"pad": 19.5, "all metrics": 32.1}, 15  # python -m tests.compiled.instructions
TILE, STATISTICS = 2048, 72  # pairs of a tile of stored weights; bytes of its row of statistics
# Share of tiles read twice: the mean of simulated heads of an 8B model; of SmolLM2 that of a pair, which has 54 tiles a
# head; of W's tiles that of the same pair (bench/results/score.csv).
LISTED, LISTED_SMALL, LISTED_PROJECTION = 0.12, 0.42, 0.32
HOST = 2.5  # ms, `python -m tests.scoring.host_time`
ROWS, K_BLOCK = 16, 16  # of W that a program of `projection` forms, of d_k that it takes at a time
PASSES64 = 18  # passes over k or v in float64 that the products before `projection` take, by its lines


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


def projections(rows: list[dict[str, str]]) -> list[str]:
    """W_h = q_h^T k_g v_g^T in tiles of ROWS rows, all of them formed once, those that are listed twice."""
    lines = paragraph(f"""
        **Scoring `projection`** of a bf16 pair. A program forms {ROWS} rows of one head's W, [d, d_v], and of its
        change: three products of 2 x {ROWS} x d_k x d_v FLOPs, each three times on tensor cores (tf32x3), in blocks
        of {K_BLOCK} of d_k. It reads 3 x d_k x d_v x 4 bytes of products k v^T, which lie in L2, and {ROWS} rows of q
        of both models. Every tile is formed once, and {LISTED_PROJECTION:.0%} of them a second time (the share of
        SmolLM2-135M and a task model of it). ms of kernels: the largest of the three, the statistics, and three launches. Before it come
        the products themselves, in float64: four products a group, and some {PASSES64} passes over k or v in float64,
        whose time is the larger. Measured: kernels alone; `score_heads` with its defaults, which has those products
        and the host's time too.""")
    lines += header("model", "TFLOP tf32", "ms of FLOPs", "GB of L2", "ms of L2", "GB of q", "ms of q", "ms of kernels",
                    MEASURED, "ms of products", "ms `score_heads` measured")
    for shape in SHAPES.values():
        heads, d, size = shape.layers * shape.heads, shape.hidden, shape.head_dim
        groups, tiles = shape.layers * shape.groups, heads * -(-d // ROWS)
        formed = 1 + LISTED_PROJECTION
        flop = formed * tiles * 3 * 3 * 2 * ROWS * size * size
        l2, q = formed * tiles * 3 * size * size * 4, formed * 2 * heads * size * d * 2
        statistics = STATISTICS * tiles * (1 / COPY + 2 / L2)
        ms = (max(flop / TF32, l2 / L2, q / COPY) + statistics + 3 * LAUNCH) * 1e3
        products = max(4 * groups * 2 * size * d * size / FP64, PASSES64 * groups * size * d * 8 / COPY) * 1e3
        found = on_gpu(rows, "alps_kernels pad projection, kernels alone", shape.name, whole(shape))
        lines.append(f"| {shape.name} | {flop / 1e12:.2f} | {flop / TF32 * 1e3:.2f} | {l2 / 1e9:.1f} "
                     f"| {l2 / L2 * 1e3:.2f} | {q / 1e9:.2f} | {q / COPY * 1e3:.2f} | {ms:.2f} "
                     f"| {compared(ms, found, ('projection', shape.name, ''))} | {products:.2f} "
                     f"| {on_gpu(rows, 'score_heads, defaults', shape.name, whole(shape))} |")
    return [*lines, ""]
