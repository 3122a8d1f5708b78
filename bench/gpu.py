"""`make gpu`: everything that needs a GPU, in one call and under ten minutes, from a bare checkout.

    OUT=some/folder python -m bench.gpu        # default: bench/results

The GPU tests, every benchmark, compute-sanitizer where it is installed, and the report. Each stage
has a time limit; one that fails is recorded and the next one runs. Their output goes to one log,
gpu-run.log: machines that are lent hand few files back. The exit code is the number of failed stages.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from bench.common import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 560  # seconds for all stages together, of which the last one keeps its own
# Without the options of pyproject.toml: they name plugins that may not be there.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
          "tests/gpu")


class Stage(NamedTuple):
    """A command and the seconds it may take; `setting`: what is added to its environment."""

    name: str
    command: tuple[str, ...]
    limit: float
    setting: dict[str, str] = {}  # noqa: RUF012, never written


def sanitizer(tool: str, limit: float) -> Stage:
    # Every tensor gets memory of its own, so that an access past its end is seen.
    return Stage(tool, ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-k", "sanitizer"), limit,
                 {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def bench(name: str, limit: float, *options: str) -> Stage:
    return Stage(f"bench-{name}", (sys.executable, "-m", f"bench.bench_{name}", *options), limit)


# Rows are written case by case, so that a bench that runs out of time leaves those it has: the telling ones first.
STAGES = (
    Stage("tests", (*PYTEST, "--durations", "10"), 160),
    bench("adamw", 90, "--ratio", "0.1", "1.0", "0.01", "0.3"),
    bench("grad_norm", 25, "--ratio", "0.1", "1.0", "0.01", "0.3"),
    bench("dw", 35, "--ratio", "0.1", "1.0", "0.3"),
    bench("score", 75),
    bench("step", 60),
    sanitizer("memcheck", 80),
    sanitizer("racecheck", 50),
    Stage("report", (sys.executable, "-m", "bench.report"), 20),
)


def run_stage(stage: Stage, out: Path, limit: float) -> str:
    """How it ended and how long it took; its output is added to the log."""
    if not shutil.which(stage.command[0]):
        return f"skipped: {stage.command[0]} is not installed"
    if limit < 5:
        return "skipped: no time is left"
    start = time.perf_counter()
    with (out / "gpu-run.log").open("a") as log:
        print(f"==== {stage.name}: {' '.join(stage.command)}", file=log, flush=True)
        # A session of its own: what the command started ends with it, and frees the card.
        process = subprocess.Popen(stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT), "OUT": str(out), **stage.setting})
        try:
            code = process.wait(limit)
            ended = "passed" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"failed: stopped after {limit:.0f} s"
    return f"{ended}, {time.perf_counter() - start:.0f} s"


def run_all(stages: tuple[Stage, ...], out: Path, whole: float = WHOLE) -> dict[str, str]:
    """Every stage in turn; each leaves the last one its time."""
    end, ends = time.perf_counter() + whole, {}
    (out / "gpu-run.log").unlink(missing_ok=True)
    for stage in stages:
        left = end - time.perf_counter() - (0 if stage is stages[-1] else stages[-1].limit)
        ends[stage.name] = run_stage(stage, out, min(stage.limit, left))
        print(f"{stage.name:12s} {ends[stage.name]}", flush=True)
        if "failed" in ends[stage.name]:
            print("\n".join((out / "gpu-run.log").read_text().splitlines()[-25:]), flush=True)
    return ends


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = environment()
    print(known, flush=True)
    ends = run_all(STAGES, out)
    (out / "gpu-run.txt").write_text(f"{known}\n" + "".join(f"{name}: {end}\n" for name, end in ends.items()))
    return sum("failed" in end for end in ends.values())


if __name__ == "__main__":
    sys.exit(main())
