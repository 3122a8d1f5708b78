"""What a GPU should show, from bytes and FLOPs alone, beside the rows that say what it did."""

from __future__ import annotations

from bench.shapes import SHAPES, Shape, heads_of

# NVIDIA's datasheet figure of an H100 SXM; a device-to-device copy and an 8192^3 bf16 product measured on one.
DATASHEET, COPY, PRODUCTS = 3.35e12, 3.0e12, 798e12
TOKENS = 8192
STEPS = {  # bytes an element; what bench_adamw calls it
    "bf16, fp32 moments": (22, "HeadAdamW master=None", "bfloat16"),
    "bf16, fp32 moments, split master": (26, "HeadAdamW", "bfloat16"),
    "bf16, bf16 moments, split master": (18, "HeadAdamW moment_dtype=bfloat16", "bfloat16"),
    "bf16, 8-bit moments, split master": (14.25, "HeadAdamW moment_dtype=8bit", "bfloat16"),
    "fp32, fp32 moments": (28, "HeadAdamW", "float32"),
}


def selected_elements(shape: Shape, ratio: float) -> int:
    """q rows and o columns of the selected heads, and k and v rows of every group that one of them reads."""
    heads = heads_of(shape, ratio, adjacent=False)
    groups = {(layer, head // (shape.heads // shape.groups)) for layer, head in heads}
    return 2 * (len(heads) + len(groups)) * shape.head_dim * shape.hidden


def on_gpu(rows: list[dict[str, str]], rival: str, *parts: str, column: str = "median_ms") -> str:
    """The last figure of a rival taken on a GPU in a case that says all of `parts`; empty where there is none."""
    found = [row[column] for row in rows if row["rival"] == rival and not row["device"].startswith("CPU")
             and all(part in row["case"] for part in parts)]
    return found[-1] if found else ""


def predicted(rows: list[dict[str, str]], counted: list[dict[str, str]]) -> list[str]:
    return [
        "## Predicted for one H100 SXM", "",
        f"Time = bytes / bandwidth: {DATASHEET / 1e12} TB/s is the datasheet's, {COPY / 1e12} TB/s a device-to-device copy "
        f"measured on such a card; products at {PRODUCTS / 1e12:.0f} TFLOP/s, an 8192 x 8192 x 8192 bf16 product measured "
        "on it. The last column is empty where `make gpu` has not yet left a row; which card a row is of stands above.", "",
        *steps(rows), *norms(rows), *scores(rows), *gradients(rows), *memory(rows, counted)]


def steps(rows: list[dict[str, str]]) -> list[str]:
    lines = ["Optimizer step on q/k/v/o of 10 % scattered heads (groups trained by any of their heads):", "",
             "| model | dtypes | elements | bytes each | MB a step | ms at 3.35 TB/s | ms at 3.0 TB/s | ms measured |",
             "|---|---|---|---|---|---|---|---|"]
    for shape in SHAPES.values():
        n = selected_elements(shape, 0.10)
        for kind, (size, rival, dtype) in STEPS.items():
            lines.append(f"| {shape.name} | {kind} | {n:,} | {size} | {n * size / 1e6:,.0f} "
                         f"| {n * size / DATASHEET * 1e3:.3f} | {n * size / COPY * 1e3:.3f} "
                         f"| {on_gpu(rows, rival, shape.name, whole(shape), ' 10% of heads scattered', dtype)} |")
    return [*lines, ""]


def norms(rows: list[dict[str, str]]) -> list[str]:
    lines = ["Gradient norm over the same slices in bf16, every gradient read once (2 bytes an element):", "",
             "| model | MB | ms at 3.0 TB/s | ms measured |", "|---|---|---|---|"]
    for shape in SHAPES.values():
        size = 2 * selected_elements(shape, 0.10)
        lines.append(f"| {shape.name} | {size / 1e6:,.0f} | {size / COPY * 1e3:.3f} "
                     f"| {on_gpu(rows, 'head_grad_norm', shape.name, whole(shape), ' 10% of heads scattered')} |")
    return [*lines, ""]


def scores(rows: list[dict[str, str]]) -> list[str]:
    lines = ["Scoring q/k/v of a bf16 pair: one read of both models is the floor, both passes read them twice.", "",
             "| model | GB of one read | ms one read at 3.0 TB/s | ms two reads | ms measured |",
             "|---|---|---|---|---|"]
    for shape in SHAPES.values():
        size = 2 * 2 * shape.layers * shape.hidden * shape.head_dim * (shape.heads + 2 * shape.groups)
        lines.append(f"| {shape.name} | {size / 1e9:.2f} | {size / COPY * 1e3:.3f} | {2 * size / COPY * 1e3:.3f} "
                     f"| {on_gpu(rows, 'alps_kernels pad qkv', shape.name, whole(shape))} |")
    return [*lines, ""]


def gradients(rows: list[dict[str, str]]) -> list[str]:
    """The q of one layer: 2 tokens n_sel hidden FLOPs."""
    lines = [f"Selected dW of one layer's q, 10 % scattered heads, bf16, {TOKENS} tokens; beside it the whole dW:", "",
             "| model | GFLOP | ms | GFLOP whole | ms | ms measured | ms whole measured |",
             "|---|---|---|---|---|---|---|"]
    for shape in SHAPES.values():
        selected = max(1, round(0.1 * shape.heads))
        part, full = (2 * TOKENS * shape.hidden * n * shape.head_dim for n in (selected, shape.heads))
        case = (f"{shape.name} q", f"{TOKENS} tokens", " 10% of heads", "bfloat16")
        cells = [f"{x:.1f} | {y:.4f}" for x, y in ((part / 1e9, part / PRODUCTS * 1e3), (full / 1e9, full / PRODUCTS * 1e3))]
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
    lines = ["A step of 16 layers of Llama-3.1-8B, bf16, 1 x 2048 tokens: at the least what autograd keeps and, once it is "
             "let go, the gradients; both at once at the most (the moment of the peak lies between).", "",
             "| | saved MiB | gradients MiB | MiB measured | ms measured |", "|---|---|---|---|---|"]
    for method, row in found.items():
        lines.append(f"| {method} | {float(row['saved_bytes']) / 2**20:,.0f} | {float(row['grad_bytes']) / 2**20:,.0f} "
                     f"| {on_gpu(rows, method, case, column='peak_mib')} | {on_gpu(rows, method, case)} |")
    return [*lines, ""]


def whole(shape: Shape) -> str:
    return f"{shape.layers} of {shape.layers} layers"
