"""What a GPU should show, computed from bytes, FLOPs and launches, beside the rows that say what it did.

Every figure of these tables but the measured columns is arithmetic on the constants of `bench.h100`.
"""

from __future__ import annotations

from bench.h100 import (
    CLOCK, COPY, DATASHEET, FAR, ISSUES, L2, LAUNCH, PRODUCTS, SMALL_PRODUCTS, SMS, header, on_gpu, paragraph,
)
from bench.predicted_scores import projections, scores
from bench.predicted_step import clipped, hosts, norms, steps, targets
from bench.shapes import SHAPES

TOKENS = 8192


def predicted(rows: list[dict[str, str]], counted: list[dict[str, str]]) -> list[str]:
    return [
        "## Predicted for one H100 SXM", "",
        *paragraph(f"""
            **Nothing in this section was measured on a GPU but the columns that say so, which `make gpu` fills; they
            are empty where it has left no row yet.** Which card a row is of stands under Measured. What is more than
            {FAR:.0%} off its prediction gets an explanation in the column beside it."""),
        *paragraph(f"""
            Constants, none of them measured here: {COPY / 1e12} TB/s, what others found a device-to-device copy to reach
            on such a card ({DATASHEET / 1e12} on the datasheet); products at {PRODUCTS / 1e12:.0f} TFLOP/s, their 8192 x
            8192 x 8192 bf16 product; those of 64 rows at {SMALL_PRODUCTS / 1e12:.0f} TFLOP/s, assumed; {L2 / 1e12} TB/s
            from L2, assumed; {SMS} SMs that issue {ISSUES} instructions a clock at {CLOCK / 1e9} GHz;
            {LAUNCH * 1e6:.0f} us from one kernel to the next."""),
        *targets(rows), *steps(rows), *norms(rows), *clipped(), *hosts(rows), *scores(rows), *projections(rows),
        *gradients(rows), *memory(rows, counted)]


def gradients(rows: list[dict[str, str]]) -> list[str]:
    """The q of one layer: 2 tokens n_sel hidden FLOPs."""
    lines = paragraph(f"""
        **Selected dW** of one layer's q, 10 % scattered heads, bf16, {TOKENS} tokens; beside it the whole dW. FLOPs =
        2 x tokens x rows of the selected heads (a tenth of them, rounded) x hidden.""")
    lines += header("model", "GFLOP", "ms", "GFLOP whole", "ms", "ms measured", "ms whole measured")
    for shape in SHAPES.values():
        selected = max(1, round(0.1 * shape.heads))
        part, full = (2 * TOKENS * shape.hidden * n * shape.head_dim for n in (selected, shape.heads))
        case = (f"{shape.name} q", f"{TOKENS} tokens", " 10% of heads", "bfloat16")
        cells = [f"{flop / 1e9:.1f} | {flop / PRODUCTS * 1e3:.4f}" for flop in (part, full)]
        cells += [on_gpu(rows, rival, *case) for rival in ("head_grad", "whole dW")]
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    return [*lines, ""]


def memory(rows: list[dict[str, str]], counted: list[dict[str, str]]) -> list[str]:
    """What a step of the Llama-3.1-8B layers allocates: what autograd keeps and the gradients, as counted above."""
    case = "Llama-3.1-8B layer stack, 16 of 32 layers"
    found = {row["method"]: row for row in counted
             if row["case"].startswith(case) and float(row["saved_bytes"] or 0) and float(row["ratio"]) == 0.10}
    if not found:
        return []
    lines = paragraph("""
        **A step of 16 layers of Llama-3.1-8B**, bf16, 1 x 2048 tokens. What autograd keeps is let go
        while gradients come: the peak lies between the larger of the two and their sum.""")
    lines += header("", "saved MiB", "gradients MiB", "MiB measured", "ms measured")
    for method, row in found.items():
        lines.append(f"| {method} | {float(row['saved_bytes']) / 2**20:,.0f} | {float(row['grad_bytes']) / 2**20:,.0f} "
                     f"| {on_gpu(rows, method, case, column='peak_mib')} | {on_gpu(rows, method, case)} |")
    return [*lines, ""]
