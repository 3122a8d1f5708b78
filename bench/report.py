"""`python -m bench.report`: docs/results.md from the rows under bench/results, and predictions beside them.

Nothing is in the page that is not a row of a CSV file or follows from a formula it states. Of rows that
were taken more than once on a device the page shows the last; the files keep all.
"""

from __future__ import annotations

import csv
import os
import sys
from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

from bench.common import RESULTS
from bench.plots import milliseconds, pictures, whole_models
from bench.predictions import predicted

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
CONDITIONS = ("device", "torch", "triton", "python", "date", "commit", "command")
MIB = 2**20
# What the cells of a benchmark's table say.
CAPTIONS = {
    "adamw": "ms a step (time over HeadAdamW's; GB/s as a share of the copy bandwidth of the same run)",
    "grad_norm": "ms (time over head_grad_norm's; share of the copy bandwidth of the same run)",
    "host": "ms until a call returns (time over that of reading the gradients)",
    "dw": "ms (time over head_grad's)",
    "score": "ms (time of the released algorithm over this; share of the copy bandwidth, one read of the weights "
             "counted)",
    "stream": "ms",
    "step": "ms a step (time over LoRA's); peak: MiB that a step allocates on top of weights and state",
}

# What beside device and case names a row, where that is not its rival.
KEYS = {"counts": ("method", "ratio"), "curves": ("kind", "step"), "patch": ("form",)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latest(rows: list[dict[str, str]], *key: str) -> list[dict[str, str]]:
    """The last row of each device, case and key, in the order of the file."""
    last = {(device(row), *(row[k] for k in ("case", *key))): row for row in rows}
    return list(last.values())


def last_run(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of the run that timed each case last: times of two runs do not stand beside each other."""
    run = {(device(row), row["case"]): [row[k] for k in CONDITIONS] for row in rows}
    return [row for row in rows if run[device(row), row["case"]] == [row[k] for k in CONDITIONS]]


def device(row: dict[str, str]) -> str:
    """Which device, busy or not."""
    return row["device"].removesuffix(", cores shared")


def measured(tables: dict[str, list[dict[str, str]]], drawn: dict[str, list[str]]) -> list[str]:
    """A table for every benchmark, model and dtype: rivals down, cases across."""
    lines = ["## Measured", "",
             "Times are medians, where the cores were shared with other work 20th percentiles; ratios are of 20th percentiles, "
             "all rivals of a table timed in turn in one run.", ""]
    for name, rows in tables.items():
        lines += [f"### {name}", "", f"Cells: {CAPTIONS[name]}.", "", *shown(drawn, name)]
        groups: dict[tuple, list[dict]] = {}
        for row in rows:
            groups.setdefault((*(row[k] for k in CONDITIONS), row["case"].split(",")[0]), []).append(row)
        said = None
        for (where, torch, triton, python, date, commit, command, _), group in groups.items():
            conditions = (f"{where}; torch {torch}, Triton {triton}, Python {python}; {date}, commit {commit}; "
                          f"`{command}`")
            if conditions != said:
                lines += [conditions, ""]
            said = conditions
            lines += [*pivot(group), ""]
    return lines if tables else [*lines, "No rows yet.", ""]


def shown(drawn: dict[str, list[str]], name: str) -> list[str]:
    """The pictures of a benchmark, one to a paragraph."""
    said = {"counts": "bytes of a step by method", "curves": "loss by step"}.get(name, "time by rival")
    return [line for file in drawn.get(name, [])
            for line in (f"![{name}: {said}, the conditions in its title](bench/{file})", "")]


def pivot(group: list[dict[str, str]]) -> list[str]:
    """One table of rows that share a model: what all cases say stands above it, what differs heads a column."""
    cases = list(dict.fromkeys(row["case"] for row in group))
    parts = {case: case.split(", ") for case in cases}
    shared = [part for part in parts[cases[0]] if all(part in p for p in parts.values())]
    heads = {case: ", ".join(part.replace(" of heads", "") for part in parts[case]
                             if part not in shared and not part.endswith(" elements")) or "ms" for case in cases}
    cells = {(row["rival"], row["case"]): cell(row) for row in group}
    rivals = list(dict.fromkeys(row["rival"] for row in group))
    notes = {rival: dict.fromkeys(row["note"] for row in group if row["rival"] == rival) for rival in rivals}
    one = {rival: next(iter(found)) if len(found) == 1 else "" for rival, found in notes.items()}
    noted = any(one.values())
    lines = [f"**{', '.join(shared)}**" if len(cases) > 1 else f"**{cases[0]}**", "",
             "| | " + " | ".join([heads[case] if len(cases) > 1 else "ms" for case in cases] + ["note"] * noted) + " |",
             "|---|" + "---|" * (len(cases) + noted)]
    for rival in rivals:
        line = [rival, *(cells.get((rival, case), "") for case in cases), *[one[rival]] * noted]
        lines.append(f"| {' | '.join(line)} |")
    return lines


def taken(row: dict[str, str]) -> list[str]:
    """What a table is of, and where its numbers are from."""
    return [f"**{row['case']}**; torch {row['torch']}, {row['date']}, commit {row['commit']}; `{row['command']}`", ""]


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
    ms = milliseconds(row)
    return (f"{ms:,.0f}" if ms >= 1000 else f"{ms:.4g}") + (f" ({'; '.join(extra)})" if extra else "")


def training(rows: list[dict[str, str]], drawn: dict[str, list[str]]) -> list[str]:
    """Show 4 of the kernels: what precision does to training."""
    if not rows:
        return []
    last = rows[-1]
    lines = ["## Training by precision", "",
             "Distance: of the trained slices from the fp32 run's at the end, over the length of that run's way (l2). Unmoved: "
             "share of the trained weights that are what they were. Held-out: 64 problems that no batch holds.", "",
             *shown(drawn, "curves"), *taken(last),
             "| | step | loss | held-out loss | distance | unmoved | state MiB |", "|---|---|---|---|---|---|---|"]
    for kind in dict.fromkeys(row["kind"] for row in rows if row["case"] == last["case"]):
        row = [row for row in rows if row["kind"] == kind and row["case"] == last["case"]][-1]
        if not row["loss"]:
            lines.append(f"| {kind} | {row['note']} | | | | | |")
            continue
        lines.append(f"| {kind} | {row['step']} | {float(row['loss']):.3f} | {float(row['test_loss']):.3f} "
                     f"| {float(row['distance']):.3f} | {float(row['same']):.1%} | {float(row['state_bytes']) / MIB:.1f} |")
    return [*lines, ""]


def counts(rows: list[dict[str, str]], drawn: dict[str, list[str]]) -> list[str]:
    """Issue 4's table: what one training step keeps and does, by method."""
    if not rows:
        return []
    lines = ["## One training step, counted", "",
             "Saved: bytes that autograd keeps for the backward pass, distinct storages, parameters not counted. dW: products "
             "that form weight gradients, a multiplication and an addition counted as two. Forward: operations that move data, "
             "and bytes they write. The heads are 10 % of all, random, q/k/v, where no other share is named; LoRA is PEFT's on "
             "q/k/v with adapters in the model's dtype; SHiRA trains as many elements as the selection. Full fine-tuning, "
             "masks, LoRA and SHiRA step with torch.optim.AdamW, whose moments have the weights' dtype; HeadAdamW keeps "
             "float32 moments, and 2 bytes more of a bfloat16 weight.", "",
             *shown(drawn, "counts")]
    for case in whole_models(rows):
        group = [row for row in rows if row["case"] == case]
        lines += [*taken(group[-1]),
                  "| | trains | saved MiB | gradients MiB | state MiB | dW GFLOP | backward GFLOP | forward |",
                  "|---|---|---|---|---|---|---|---|"]
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


def patches(rows: list[dict[str, str]]) -> list[str]:
    """A tuned tenth of the heads as a file, beside what others write."""
    if not rows:
        return []
    last = rows[-1]
    lines = ["## Head patches", "", f"{last['device']}; torch {last['torch']}, {last['date']}, commit {last['commit']}; `{last['command']}`. "
             "Random heads; a patch of Llama-3.1-8B is the mean over 20 draws.", ""]
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += [f"**{case}**", "", "| | values | file | times the patch | ms |", "|---|---|---|---|---|"]
        for row in (row for row in rows if row["case"] == case):
            size = f"{float(row['file_bytes']) / 1e6:,.1f} MB" + (f" ({row['note']})" if row["note"] else "") if row["file_bytes"] else ""
            ratio = f"{float(row['ratio']):.2f}" if row["ratio"] else ""
            ms = f"{float(row['median_ms']):,.0f}" + (f" ({row['note']})" if row["note"] else "") if row["median_ms"] else ""
            lines.append(f"| {row['form']} | {float(row['values']) / 1e6:,.2f} M | {size} | {ratio} | {ms} |")
        lines.append("")
    return lines


def main(argv: list[str] | None = None) -> None:
    ArgumentParser("python -m bench.report", description="Write docs/results.md, or $OUT/results.md, from the rows.").parse_args(argv or [])
    folder, page = Path(os.environ.get("OUT") or RESULTS), PAGE
    if os.environ.get("OUT"):
        page = folder / "results.md"
    found = {path.stem: rows_of(path) for path in sorted(folder.glob("*.csv"))}
    tables = {name: latest(rows, *KEYS[name]) if name in KEYS else latest(last_run(rows), "rival")
              for name, rows in found.items() if name in CAPTIONS or name in KEYS}
    page.parent.mkdir(parents=True, exist_ok=True)
    drawn = {}
    if find_spec("matplotlib"):
        drawn = pictures(page.parent / "bench", tables)
    else:
        print("matplotlib is not installed: no pictures")
    counted, trained, patched = (tables.pop(name, []) for name in ("counts", "curves", "patch"))
    rows = [row for group in tables.values() for row in group]
    page.write_text("\n".join([
        "# Results", "", "Generated by `python -m bench.report`; every measured row is in `bench/results/`.", "",
        *counts(counted, drawn), *training(trained, drawn), *patches(patched), *measured(tables, drawn),
        *predicted(rows, counted)]))
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
