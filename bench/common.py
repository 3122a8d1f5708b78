"""What every benchmark needs: an environment line, a parity gate, a clock, rows and a table."""

from __future__ import annotations

import csv
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = ("date", "commit", "device", "torch", "triton", "transformers", "python", "command")
COLUMNS = (*ENVIRONMENT, "bench", "case", "rival", "median_ms", "p20_ms", "p80_ms", "bytes", "gbps", "copy_gbps",
           "share", "peak_mib", "launches", "ratio", "note")
SHOWN = ("case", "rival", "median_ms", "gbps", "share", "ratio", "note")


def _git(*arguments: str) -> str:
    """What git says of this tree; nothing where there is no git or no history."""
    try:
        ran = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return ran.stdout.strip()


# What is checked out when a benchmark starts; hours later another commit may be.
AT_START = (_git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(_git("status", "--porcelain", "-uno"))


# More wanted to run than one benchmark before this one does.
SHARED = hasattr(os, "getloadavg") and os.getloadavg()[0] > torch.get_num_threads() + 0.7


def device_name() -> str:
    """The GPU, or the CPU with its threads and whether its cores had other work when the benchmark started."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads{', cores shared' if SHARED else ''}"


def environment() -> dict[str, str]:
    """What a number was taken on: the first columns of its row."""
    commit = os.environ.get("COMMIT") or AT_START  # the variable: for a copy of the tree without its history
    module = getattr(sys.modules["__main__"], "__spec__", None)
    called = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return {
        "date": date.today().isoformat(), "commit": commit,
        "device": device_name(), "torch": torch.__version__, "triton": _version("triton"),
        "transformers": _version("transformers"), "python": platform.python_version(),
        "command": interpreted + shlex.join([*called, *sys.argv[1:]]),
    }


def gate(name: str, ok: bool, detail: str) -> None:
    """No number is reported on a red parity check: stops the benchmark.

    Raises:
        SystemExit: the check failed.
    """
    if not ok:
        raise SystemExit(f"parity of {name} is red, nothing is timed: {detail}")
    print(f"parity of {name}: {detail}")


def measure(fn: Callable[[], object], *, repeats: int = 10, warmup: int = 2) -> dict[str, float]:
    """Median, 20th and 80th percentile of the time of one call, in ms.

    On CUDA by events around calls with the L2 cache flushed; on a CPU by the wall clock.
    """
    if torch.cuda.is_available():
        from triton.testing import do_bench

        median, low, high = do_bench(fn, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
        return {"median_ms": median, "p20_ms": low, "p80_ms": high}
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return percentiles(times)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of times in ms."""
    if len(times) == 1:
        return dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), times[0])
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_ms": statistics.median(times), "p20_ms": fifths[0], "p80_ms": fifths[-1]}


def copy_bandwidth(numel: int | None = None) -> float:
    """GB/s of a device-to-device copy, bytes read and written both counted."""
    cuda = torch.cuda.is_available()
    source = torch.empty(numel or (2**30 if cuda else 2**24), dtype=torch.int32, device="cuda" if cuda else "cpu")
    target = torch.empty_like(source)
    source.fill_(1)
    took = measure(lambda: target.copy_(source), repeats=5)["median_ms"]
    return 2 * source.numel() * source.element_size() / took / 1e6


def write_rows(name: str, rows: Sequence[dict], columns: Sequence[str] = COLUMNS) -> Path:
    """Append rows to bench/results/<name>.csv (or $OUT); every row has every column, in one order."""
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path, known = folder / f"{name}.csv", environment()
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({**known, "bench": name, **{k: _short(v) for k, v in row.items()}})
    return path


def write_each(name: str, rows: Iterable[dict]) -> tuple[list[dict], Path]:
    """Write and print every row as soon as it is there, so that a run that is stopped keeps those it has.

    Returns:
        The rows, and the file they are in.
    """
    kept, path = [], None
    for row in rows:
        path = write_rows(name, [row])
        kept.append(row)
        time_of = f"{row['median_ms']:.4g} ms" if "median_ms" in row else row.get("note", "")
        print(f"  {row.get('rival', '')}: {time_of}", flush=True)
    if path is None:
        raise ValueError(f"the benchmark {name} has no row")
    return kept, path


def table(rows: Sequence[dict], columns: Sequence[str] = SHOWN) -> None:
    """Print rows as a table people can read; columns that no row fills are left out."""
    shown = [c for c in columns if any(row.get(c) not in (None, "") for row in rows)]
    lines = [shown, *(["" if row.get(c) is None else str(_short(row[c])) for c in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
