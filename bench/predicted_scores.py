"""Predictions of scoring, which goes over the weights twice."""

from __future__ import annotations

from bench.h100 import (
    CLOCK, COPY, FP64, ISSUES, L2, LAUNCH, MEASURED, SMS, TF32, compared, header, on_gpu, paragraph, whole,
)
from bench.shapes import SHAPES

INSTRUCTIONS = 22  # for each pair of weights and pass
ROWS = 16  # of W that a program of `projection` forms
PASSES64 = 18  # passes over k or v in float64 that the products before `projection` take, by its lines


def scores(rows: list[dict[str, str]]) -> list[str]:
    lines = paragraph(f"""
        **Scoring q/k/v** of a bf16 pair, two passes over the weights: each reads both models once, at 3.0 TB/s. Beside
        it the time of its instructions: {INSTRUCTIONS} of a thread for each pair of weights and
        pass, 32 threads at once. The larger counts, and four
        launches. One read of the weights is the floor. The function around the kernels also makes its work list on the
        host, which took 45 to 63 ms for Llama-3.1-8B on a CPU here: `score_heads` will take that. Measured: kernels
        alone; `score_heads`, qkv.""")
    lines += header("model", "GB of one read", "ms one read", "ms two reads", "ms of instructions", "ms", MEASURED,
                    "ms `score_heads` measured")
    for shape in SHAPES.values():
        pairs = shape.layers * shape.hidden * shape.head_dim * (shape.heads + 2 * shape.groups)
        size, issue = 4 * pairs, 2 * pairs * INSTRUCTIONS / 32 / (SMS * ISSUES * CLOCK)
        ms = (max(2 * size / COPY, issue) + 4 * LAUNCH) * 1e3
        found = on_gpu(rows, "alps_kernels pad qkv, kernels alone", shape.name, whole(shape))
        lines.append(f"| {shape.name} | {size / 1e9:.2f} | {size / COPY * 1e3:.3f} | {2 * size / COPY * 1e3:.3f} "
                     f"| {issue * 1e3:.3f} | {ms:.3f} | {compared(ms, found, ('qkv', shape.name, ''))} "
                     f"| {on_gpu(rows, 'score_heads, qkv', shape.name, whole(shape))} |")
    return [*lines, ""]


def projections(rows: list[dict[str, str]]) -> list[str]:
    """W_h = q_h^T k_g v_g^T in tiles of ROWS rows, formed twice: once for each pass."""
    lines = paragraph(f"""
        **Scoring `projection`** of a bf16 pair, two passes. A program forms {ROWS} rows of one head's W, [d, d_v], and
        of its change: three products of 2 x {ROWS} x d_k x d_v FLOPs, each three times on tensor cores (tf32x3). It
        reads 3 x d_k x d_v x 4 bytes of products k v^T, which lie in L2, and {ROWS} rows of q of both models. ms of kernels:
        the largest of the three, and two launches. Before it come the products themselves, in float64: four products
        a group, and some {PASSES64} passes over k or v in float64, whose time is the larger. Measured: kernels alone;
        `score_heads` with its defaults, which has those products and the host's time too.""")
    lines += header("model", "TFLOP tf32", "ms of FLOPs", "GB of L2", "ms of L2", "GB of q", "ms of q", "ms of kernels",
                    MEASURED, "ms of products", "ms `score_heads` measured")
    for shape in SHAPES.values():
        heads, d, size = shape.layers * shape.heads, shape.hidden, shape.head_dim
        groups, tiles = shape.layers * shape.groups, heads * -(-d // ROWS)
        flop = 2 * tiles * 3 * 3 * 2 * ROWS * size * size
        l2, q = 2 * tiles * 3 * size * size * 4, 2 * 2 * heads * size * d * 2
        ms = (max(flop / TF32, l2 / L2, q / COPY) + 2 * LAUNCH) * 1e3
        products = max(4 * groups * 2 * size * d * size / FP64, PASSES64 * groups * size * d * 8 / COPY) * 1e3
        found = on_gpu(rows, "alps_kernels pad projection, kernels alone", shape.name, whole(shape))
        lines.append(f"| {shape.name} | {flop / 1e12:.2f} | {flop / TF32 * 1e3:.2f} | {l2 / 1e9:.1f} "
                     f"| {l2 / L2 * 1e3:.2f} | {q / 1e9:.2f} | {q / COPY * 1e3:.2f} | {ms:.2f} "
                     f"| {compared(ms, found, ('projection', shape.name, ''))} | {products:.2f} "
                     f"| {on_gpu(rows, 'score_heads, defaults', shape.name, whole(shape))} |")
    return [*lines, ""]
