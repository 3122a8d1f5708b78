"""`python -m bench.study run|list|rerun|report [--profile cpu|gpu|tiny]`.

`run` goes on where it stopped: a cell whose row is in the table is not run again. Several
processes may run at once and share the cells. The most wanted cells come first, so that
`--seconds 3600` is a small study on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import RESULTS, environment

from .cells import Cell, Study, dev_losses
from .locks import locked

MEASURED = ("exact_match", "test_loss", "dev_loss", "english_ppl", "code_ppl", "humaneval_loss", "train_loss", "train_loss_bits", "steps",
            "step_ms", "trained", "state_bytes", "file_bytes", "peak_mib", "heads", "right")
KNOWN = ("date", "commit", "device", "torch", "triton", "transformers", "python")
COLUMNS = ("key", *Cell.__dataclass_fields__, *MEASURED, *KNOWN)


def table_path() -> Path:
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    return folder / "study.csv"


def scratch() -> Path:
    """Scores that cells share, and the locks of running ones."""
    folder = table_path().parent / "study-scores"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
    with locked(scratch() / "table"), path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def run(profile: str, only: list[str], limit: int | None, seconds: float | None) -> None:
    """Run cells without a row, in order; asks again after each, since rates become known on the way."""
    from .train import base_row, run_cell

    study, started, count = Study.load(profile), time.perf_counter(), 0
    while True:
        rows = read(table_path())
        left = [c for c in study.cells(dev_losses(rows)) if c.key not in rows and (not only or c.method in only)]
        if not left:
            return
        if (limit is not None and count >= limit) or (seconds is not None and time.perf_counter() - started > seconds):
            print("stopped; run again to go on")
            return
        with first_free(left) as cell:
            if cell is None:  # other processes are at them, and more may follow from what they find
                time.sleep(2)
            elif cell.key not in read(table_path()):
                began = time.perf_counter()
                measured = base_row(cell, study.plan) if cell.method == "base" else run_cell(
                    cell, study.plan, study.task_rate(cell, study.chosen(dev_losses(rows))), scratch())
                write(table_path(), cell, measured)
                said = ", ".join(f"{name} {measured[name]:.4g}" for name in
                                 ("exact_match", "test_loss", "dev_loss", "english_ppl", "code_ppl") if name in measured)
                print(f"{cell.key}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)
                count += 1


@contextmanager
def first_free(left: list[Cell]) -> Iterator[Cell | None]:
    """The first cell that no other process is at; none is at it while the block runs."""
    for cell in left:
        with locked(scratch() / cell.key.replace("/", "-"), wait=False) as mine:
            if mine:
                yield cell
                return
    yield None


def rerun(profile: str, key: str) -> int:
    """Run one cell again and compare its last training loss bit for bit; 0 where it is equal."""
    from .train import run_cell

    rows, study = read(table_path()), Study.load(profile)
    if key not in rows:
        raise SystemExit(f"no row is called {key!r} in {table_path()}")
    row = rows[key]
    cell = Cell(**{name: (float(row[name]) if name in ("ratio", "lr") else int(row[name]) if name == "seed" else row[name])
                   for name in Cell.__dataclass_fields__})
    measured = run_cell(cell, study.plan, study.task_rate(cell, study.chosen(dev_losses(rows))) or 0.0, scratch())
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
        rows = read(table_path())
        for cell in Study.load(given.profile).cells(dev_losses(rows)):
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
