"""`python -m bench.report`: docs/results.md from the rows under bench/results, and predictions beside them.

Nothing is in the page that is not a row of a CSV file or follows from a formula it states. Of rows that
were taken more than once on a device the page shows the last; the files keep all.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from bench.common import RESULTS
from bench.predictions import predicted

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
CONDITIONS = ("device", "torch", "triton", "python", "date", "commit", "command")
MIB = 2**20
# What the cells of a benchmark's table say.
CAPTIONS = {
    "adamw": "ms a step (time over HeadAdamW's; GB/s as a share of the copy bandwidth of the same run)",
    "grad_norm": "ms (time over head_grad_norm's; share of the copy bandwidth of the same run)",
    "dw": "ms (time over head_grad's)",
    "score": "ms (time of the released algorithm over this; share of the copy bandwidth, one read of the weights counted)",
    "stream": "ms",
    "step": "ms a step (time over LoRA's); peak: MiB that a step allocates on top of weights and state",
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: list[dict[str, str]], *key: str) -> list[dict[str, str]]:
    """The last row of each device, case and rival, in the order of the file."""
    last = {tuple(row[k] for k in ("device", "case", *key)): row for row in rows}
    return list(last.values())


def measured(paths: list[Path]) -> list[str]:
    """A table for every benchmark, model and dtype: rivals down, cases across."""
    lines = ["## Measured", ""]
    for path in paths:
        lines += [f"### {path.stem}", "", f"Cells: {CAPTIONS[path.stem]}.", ""]
        groups: dict[tuple, list[dict]] = {}
        for row in latest(rows_of(path), "rival"):
            groups.setdefault((*(row[k] for k in CONDITIONS), row["case"].split(",")[0]), []).append(row)
        said = None
        for (device, torch, triton, python, date, commit, command, _), group in groups.items():
            conditions = f"{device}; torch {torch}, Triton {triton}, Python {python}; {date}, commit {commit}; `{command}`"
            if conditions != said:
                lines += [conditions, ""]
            said = conditions
            lines += [*pivot(group), ""]
    return lines if paths else [*lines, "No rows yet.", ""]


def pivot(group: list[dict[str, str]]) -> list[str]:
    """One table of rows that share a model: what all cases say stands above it, what differs heads a column."""
    cases = list(dict.fromkeys(row["case"] for row in group))
    parts = {case: case.split(", ") for case in cases}
    shared = [part for part in parts[cases[0]] if all(part in p for p in parts.values())]
    heads = {case: ", ".join(part for part in parts[case] if part not in shared) or "ms" for case in cases}
    cells = {(row["rival"], row["case"]): cell(row) for row in group}
    rivals = list(dict.fromkeys(row["rival"] for row in group))
    notes = {rival: dict.fromkeys(row["note"] for row in group if row["rival"] == rival) for rival in rivals}
    one = {rival: next(iter(found)) if len(found) == 1 else "" for rival, found in notes.items()}
    noted = any(one.values())
    lines = [f"**{', '.join(shared)}**" if len(cases) > 1 else f"**{cases[0]}**", "",
             "| | " + " | ".join([heads[case] if len(cases) > 1 else "ms" for case in cases] + ["note"] * noted) + " |",
             "|---|" + "---|" * (len(cases) + noted)]
    for rival in rivals:
        lines.append(f"| {rival} | " + " | ".join([cells.get((rival, case), "") for case in cases] + [one[rival]] * noted) + " |")
    return lines


def cell(row: dict[str, str]) -> str:
    if not row["median_ms"]:
        return "–"
    extra = []
    if row["ratio"]:
        extra.append(f"{float(row['ratio']):.3g} ×")
    if row["share"] and row["bench"] != "dw":
        extra.append(f"{float(row['share']):.0%}")
    if row["peak_mib"] and row["bench"] in ("step", "stream"):
        extra.append(f"peak {float(row['peak_mib']):,.0f} MiB")
    return f"{float(row['median_ms']):.4g}" + (f" ({'; '.join(extra)})" if extra else "")


def counts(rows: list[dict[str, str]]) -> list[str]:
    """Issue 4's table: what one training step keeps and does, by method."""
    if not rows:
        return []
    lines = ["## One training step, counted", "",
             "Saved: bytes that autograd keeps for the backward pass, distinct storages, parameters not counted. dW: products that "
             "form weight gradients, a multiplication and an addition counted as two. Forward: operations that move data, and "
             "bytes they write. The heads are 10 % of all, random, q/k/v, where no other share is named; LoRA is PEFT's on q/k/v "
             "with adapters in the model's dtype; SHiRA trains as many elements as the selection. Full fine-tuning, masks, LoRA and SHiRA step with torch.optim.AdamW, "
             "whose moments have the weights' dtype; HeadAdamW keeps float32 moments, and 2 bytes more of a bfloat16 weight.", ""]
    for case in dict.fromkeys(row["case"] for row in rows):
        group = [row for row in latest(rows, "method", "ratio") if row["case"] == case]
        lines += [f"**{case}**; torch {group[-1]['torch']}, {group[-1]['date']}, commit {group[-1]['commit']}; `{group[-1]['command']}`", "",
                  "| | trains | saved MiB | gradients MiB | state MiB | dW GFLOP | backward GFLOP | forward |", "|---|---|---|---|---|---|---|---|"]
        for row in group:
            name = row["method"] if float(row["ratio"]) == 0.1 else f"{row['method']}, {float(row['ratio']):.0%}"
            if not row["saved_bytes"]:
                lines.append(f"| {name} | {row['note']} | | | | | | |")
                continue
            lines.append(f"| {name} | {float(row['trained']) / 1e6:,.2f} M | " + " | ".join(
                f"{float(row[k]) / MIB:,.1f}" for k in ("saved_bytes", "grad_bytes", "state_bytes"))
                + f" | {float(row['dw_gflop']):,.1f} | {float(row['backward_gflop']):,.0f} "
                f"| {row['forward_ops']} ops, {float(row['forward_bytes']) / MIB:,.0f} MiB |")
        lines.append("")
    return lines


def main(argv: list[str] | None = None) -> None:
    folder = Path(os.environ.get("OUT") or RESULTS)
    paths = sorted(path for path in folder.glob("*.csv") if path.stem in CAPTIONS)
    rows = [row for path in paths for row in rows_of(path)]
    counted = rows_of(folder / "counts.csv") if (folder / "counts.csv").exists() else []
    text = "\n".join(["# Results", "", "Generated by `python -m bench.report`; every measured row is in `bench/results/`.", "",
                      *counts(counted), *measured(paths), *predicted(rows, counted)])
    page = Path(os.environ["OUT"]) / "results.md" if os.environ.get("OUT") else PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    print(page)


if __name__ == "__main__":
    main()
