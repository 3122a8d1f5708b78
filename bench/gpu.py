"""`make gpu`: everything that needs a GPU, in one call and under ten minutes, from a bare checkout.

    OUT=some/folder python -m bench.gpu        # default: bench/results

The GPU tests, the interpreted kernel tests compiled for the card, compute-sanitizer where it is
installed, every benchmark and the report. Each stage has a time limit and a log of its own; one
that fails is recorded and the next one runs. The exit code is the number of failed stages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench.common import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SANITIZED = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py", "-k", "sanitizer"]
STAGES = (  # name, command, seconds at most
    ("tests", [*PYTEST, "tests/test_gpu.py"], 180),
    ("bench-adamw", [sys.executable, "-m", "bench", "adamw"], 120),
    ("bench-score", [sys.executable, "-m", "bench", "score"], 120),
    ("memcheck", ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *SANITIZED], 90),
    ("racecheck", ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9", *SANITIZED], 60),
    ("report", [sys.executable, "-m", "bench.report"], 30),
)


def run_stage(name: str, command: list[str], limit: int, out: Path) -> str:
    """One word on how it ended, and how long it took."""
    if not shutil.which(command[0]):
        return f"skipped: {command[0]} is not installed"
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit,
                                  env={**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(out)}).returncode
            ended = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"failed: stopped after {limit} s"
    return f"{ended}, {time.perf_counter() - start:.0f} s"


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", RESULTS))
    out.mkdir(parents=True, exist_ok=True)
    print(environment())
    ends = {}
    for name, command, limit in STAGES:
        ends[name] = run_stage(name, command, limit, out)
        print(f"{name:12s} {ends[name]}", flush=True)
        if "failed" in ends[name]:
            print("\n".join((out / f"{name}.log").read_text().splitlines()[-25:]), flush=True)
    (out / "gpu-run.txt").write_text(f"{environment()}\n" + "".join(f"{n}: {e}\n" for n, e in ends.items()))
    return sum("failed" in end for end in ends.values())


if __name__ == "__main__":
    sys.exit(main())
