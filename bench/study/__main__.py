"""`python -m bench.study run|list|rerun|report [--profile cpu|gpu|tiny]`.

`run` goes on where it stopped: a cell whose row is in the table is not run again. Learning rates
are swept first, at a seed of their own, and chosen by the loss on the development split.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import RESULTS, environment

from . import cells
from .cells import Cell

MEASURED = ("exact_match", "test_loss", "dev_loss", "english_ppl", "code_ppl", "train_loss", "train_loss_bits", "steps",
            "step_ms", "trained", "state_bytes", "file_bytes", "peak_mib", "heads", "right")
KNOWN = ("date", "commit", "device", "torch", "triton", "transformers", "python")
COLUMNS = ("key", *Cell.__dataclass_fields__, *MEASURED, *KNOWN)


def table_path() -> Path:
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / "study.csv"


def read(path: Path) -> dict[str, dict[str, str]]:
    """Rows by cell; a run that was cut off in the middle of a row leaves a row too short, which is dropped."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["key"]: row for row in csv.DictReader(file) if row.get("python")}


def write(path: Path, cell: Cell, measured: dict[str, Any]) -> None:
    known = environment()
    row = {"key": cell.key, **asdict(cell), **measured, **{name: known[name] for name in KNOWN}}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def chosen_rates(profile: str, plan: dict, rates: dict, rows: dict[str, dict]) -> dict[tuple[str, str], float]:
    """The rate of (task, method) with the least development loss, where all of its sweep has run."""
    chosen = {}
    for task in plan["tasks"]:
        for method in plan["methods"]:
            swept = [c for c in cells.sweep(profile, plan, rates) if (c.task, c.method) == (task, method)]
            if all(c.key in rows for c in swept):
                chosen[task, method] = min(swept, key=lambda c: float(rows[c.key]["dev_loss"])).lr
    return chosen


def task_rates(plan: dict, chosen: dict[tuple[str, str], float]) -> dict[str, float]:
    """The learning rate of a task's task model: that of full fine-tuning; a transfer's target has its source's."""
    rates = {task: lr for (task, method), lr in chosen.items() if method == "full"}
    return {**{target: rates[source] for source, target in plan["transfer"] if source in rates}, **rates}


def todo(profile: str, only: list[str]) -> Iterator[Cell]:
    """Cells without a row, in order; asks again after each, since rates become known on the way."""
    while True:
        plan, rates = cells.load(profile)
        rows = read(table_path())
        chosen = chosen_rates(profile, plan, rates, rows)
        bases = [Cell(profile, task, "base") for task in plan["tasks"]]
        wanted = [*bases, *cells.sweep(profile, plan, rates), *cells.main(profile, plan, chosen)]
        fast = task_rates(plan, chosen)
        left = [c for c in wanted if c.key not in rows and (not only or c.method in only)
                and (not c.task_model or (c.heads_from or c.task) in fast)]
        if not left:
            return
        yield left[0]


def run(profile: str, only: list[str], limit: int | None, seconds: float | None) -> None:
    from .train import base_row, run_cell

    plan, rates = cells.load(profile)
    cache = table_path().parent / "study-scores"
    cache.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for count, cell in enumerate(todo(profile, only)):
        if (limit is not None and count >= limit) or (seconds is not None and time.perf_counter() - started > seconds):
            print("stopped; run again to go on")
            return
        chosen = chosen_rates(profile, plan, rates, read(table_path()))
        began = time.perf_counter()
        measured = base_row(cell, plan) if cell.method == "base" else run_cell(cell, plan, task_rates(plan, chosen), cache)
        write(table_path(), cell, measured)
        said = ", ".join(f"{name} {measured[name]:.4g}" for name in ("exact_match", "test_loss", "dev_loss", "english_ppl", "code_ppl")
                         if name in measured)
        print(f"{cell.key}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)


def rerun(profile: str, key: str) -> int:
    """Run one cell again and compare its last training loss bit for bit; 0 where it is equal."""
    from .train import run_cell

    rows = read(table_path())
    if key not in rows:
        raise SystemExit(f"no row is called {key!r} in {table_path()}")
    row = rows[key]
    cell = Cell(**{name: (float(row[name]) if name in ("ratio", "lr") else int(row[name]) if name == "seed" else row[name])
                   for name in Cell.__dataclass_fields__})
    plan, rates = cells.load(profile)
    chosen = chosen_rates(profile, plan, rates, rows)
    measured = run_cell(cell, plan, task_rates(plan, chosen), table_path().parent / "study-scores")
    same = measured["train_loss_bits"] == row["train_loss_bits"]
    print(f"{key}: loss {measured['train_loss_bits']}, in the table {row['train_loss_bits']}: {'equal' if same else 'DIFFERENT'}"
          f" (table: {row['device']}, torch {row['torch']})")
    return int(not same)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("run", "list", "rerun", "report"))
    parser.add_argument("key", nargs="?", help="of the cell to rerun")
    parser.add_argument("--profile", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], help="methods")
    parser.add_argument("--limit", type=int, help="cells at most")
    parser.add_argument("--seconds", type=float, help="begin no cell after this time")
    given = parser.parse_intermixed_args(argv)
    if given.verb == "run":
        run(given.profile, given.only, given.limit, given.seconds)
    elif given.verb == "list":
        plan, rates = cells.load(given.profile)
        rows = read(table_path())
        for cell in [*cells.sweep(given.profile, plan, rates), *cells.main(given.profile, plan, chosen_rates(given.profile, plan, rates, rows))]:
            print("done" if cell.key in rows else "todo", cell.key)
    elif given.verb == "rerun":
        if not given.key:
            parser.error("rerun needs the key of a cell (see list)")
        return rerun(given.profile, given.key)
    else:
        from .report import write_report

        write_report(given.profile, read(table_path()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
