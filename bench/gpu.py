"""`make gpu`: everything that needs a GPU, in one call of at most nine minutes, from a bare checkout.

    OUT=some/folder python -m bench.gpu        # default: bench/results

First a check that Triton can compile its launchers; then stages, the most wanted first: the small GPU tests, the
step, scoring, the norm and the host's time within four minutes; after them the other tests, the other benchmarks,
compute-sanitizer and the report. Each stage has a time limit; one that fails is recorded and the next one runs. Their
output goes to one log, gpu-run.log; how each ended to gpu-run.txt, after every stage. Benchmarks write each row as
soon as it was measured, so that a stage that runs out of time keeps those it has. The exit code is the number of
failed stages. The study's GPU profile is a call of its own: `make study PROFILE=gpu`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.common import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 540  # seconds for all stages together, of which the last one keeps its own
USEFUL = 240  # seconds in which the stages of FIRST are through
# Without the options of pyproject.toml: they name plugins that may not be there. -rP shows what passing tests printed.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-rfEP", "-o", "addopts=", "-p", "no:cacheprovider", "tests/gpu")
REFUSALS = ("Device not supported", "not supported on this device", "Unable to find a supported device")
# Allocates 256 bytes through the driver, without torch: what a sanitizer that refuses the device fails at.
PROBE = (sys.executable, "-c", """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
for name, call in (("cuInit", lambda: cuda.cuInit(0)),
                   ("cuDeviceGet", lambda: cuda.cuDeviceGet(ctypes.byref(device), 0)),
                   ("cuDevicePrimaryCtxRetain", lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)),
                   ("cuCtxSetCurrent", lambda: cuda.cuCtxSetCurrent(context)),
                   ("cuMemAlloc", lambda: cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(256)))):
    if code := call():
        sys.exit(f"{name} returned error {code}")
""")


class Stage(NamedTuple):
    """A command and the seconds it may take.

    Attributes:
        setting: what is added to its environment.
        probe: a short command that must succeed first; where it does not, the stage counts as refused, not as failed.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    setting: dict[str, str] = {}  # noqa: RUF012, never written
    probe: tuple[str, ...] = ()


def sanitizer(tool: str, limit: float, tests: str = "sanitizer") -> Stage:
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    # Every tensor gets memory of its own, so that an access past its end is seen.
    return Stage(tool, (*command, *PYTEST, "-k", tests), limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                 (*command, *PROBE))


def bench(name: str, limit: float, *options: str, stage: str = "") -> Stage:
    return Stage(f"bench-{stage or name}", (sys.executable, "-m", f"bench.bench_{name}", *options), limit)


FIRST = (
    Stage("tests", (*PYTEST, "--durations", "10", "-k", "sanitizer"), 90),
    bench("adamw", 75, "--ratio", "0.1"),
    bench("score", 45),
    bench("grad_norm", 15, "--ratio", "0.1"),
    bench("host", 15),
)
STAGES = (
    *FIRST,
    bench("adamw", 25, "--dtype", "float32", "--ratio", "0.1", stage="adamw-fp32"),
    Stage("tests-more", (*PYTEST, "--durations", "10", "-k", "not sanitizer"), 71),
    bench("adamw", 30, "--ratio", "1.0", "0.01", "0.3", stage="adamw-more"),
    bench("dw", 20, "--ratio", "0.1", "1.0", "0.3"),
    bench("step", 29),
    sanitizer("memcheck", 42),
    # Of shared memory, which the norm, scores and 8-bit moments use.
    sanitizer("racecheck", 19, "sanitizer and (clipping or scores or 8_bit)"),
    sanitizer("initcheck", 19, "sanitizer and dtype1"),  # mostly bfloat16, in pytest's names
    bench("score", 30, "--tiles", stage="score-tiles"),
    Stage("report", (sys.executable, "-m", "bench.report"), 15),
)


def toolchain() -> str:
    """What Triton lacks to compile its launchers at run time, in one line; empty where nothing is missing.

    Triton takes the command in CC, else gcc, else clang, and the Python headers of sysconfig's scheme.
    """
    need = "Triton compiles its kernels' launchers at run time and needs a C compiler and Python's headers"
    compiler = os.environ.get("CC", next(filter(shutil.which, ("gcc", "clang")), None))
    if compiler is None:
        return f"no C compiler: neither gcc nor clang is on the PATH and CC is not set. {need}: install gcc"
    if not shutil.which(compiler):
        return f"no C compiler: CC is {compiler!r}, which cannot be run. {need}: set CC to a compiler that is installed"
    scheme = sysconfig.get_default_scheme()
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(folder) / "Python.h").is_file():
        return f"no Python.h in {folder}. {need}: install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    trial = [compiler, "-fsyntax-only", "-x", "c", f"-I{folder}", "-"]
    try:
        ran = subprocess.run(trial, input="#include <Python.h>\n", capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} does not run: {error}. {need}"
    said = ([line for line in ran.stderr.splitlines() if "error" in line] or [f"exit code {ran.returncode}"])[0]
    return f"{compiler} does not compile a file that includes Python.h: {said}. {need}" if ran.returncode else ""


class Runner:
    """Runs stages, one after the other, and keeps how each ended.

    Args:
        out: folder of gpu-run.log and gpu-run.txt.
        heading: first line of gpu-run.txt.
    """

    def __init__(self, out: Path, heading: str = "") -> None:
        self.out, self.heading, self.log = out, heading, out / "gpu-run.log"
        self.ends: dict[str, str] = {}
        self.refused: dict[str, str] = {}  # by the tool of a probe: its words
        self.log.unlink(missing_ok=True)

    def record(self, name: str, end: str) -> None:
        """Print how a stage ended, and write it at once: the run may be stopped."""
        self.ends[name] = end
        print(f"{name:12s} {end}", flush=True)
        lines = [self.heading, *(f"{stage}: {how}" for stage, how in self.ends.items())]
        (self.out / "gpu-run.txt").write_text("\n".join(filter(None, lines)) + "\n")

    def run(self, stages: tuple[Stage, ...], whole: float = WHOLE) -> dict[str, str]:
        """Every stage in turn; each leaves the last one its time."""
        end = time.perf_counter() + whole
        for stage in stages:
            left = end - time.perf_counter() - (0 if stage is stages[-1] else stages[-1].limit)
            self.record(stage.name, self.stage(stage, min(stage.limit, left)))
            if self.ends[stage.name].startswith("failed"):
                print("\n".join(self.log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        return self.ends

    def stage(self, stage: Stage, limit: float) -> str:
        """How it ended and how long it took; its output is added to the log."""
        tool = stage.command[0]
        if not shutil.which(tool):
            return f"skipped: {tool} is not installed"
        if limit < 5:
            return "skipped: no time is left"
        start = time.perf_counter()
        if stage.probe and tool not in self.refused:
            code, said = self._command(f"{stage.name}, probe", stage.probe, {}, min(limit, 30))
            self.refused[tool] = "" if code == 0 else _words(said, code)
        if self.refused.get(tool) and stage.probe:
            return f"refused by {tool}: {self.refused[tool]}"
        limit -= time.perf_counter() - start
        code, said = self._command(stage.name, stage.command, stage.setting, max(limit, 1))
        took = f"{time.perf_counter() - start:.0f} s"
        if code == 0:
            return f"passed, {took}"
        if stage.probe and any(refusal in said for refusal in REFUSALS):
            return f"refused by {tool}: {_words(said, code)}"
        return f"failed: stopped after {limit:.0f} s" if code is None else f"failed with exit code {code}, {took}"

    def _command(self, name: str, command: tuple[str, ...], setting: dict[str, str],
                 limit: float) -> tuple[int | None, str]:
        """The exit code, None for one that was stopped, and what was added to the log."""
        with self.log.open("a") as log:
            print(f"==== {name}: {shlex.join(command)}", file=log, flush=True)
            at = log.tell()
            # A session of its own: what the command started ends with it, and frees the card.
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                                       env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
                                            "OUT": str(self.out), **setting})
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        return code, self.log.read_bytes()[at:].decode(errors="replace")


def _words(said: str, code: int | None) -> str:
    """The line that says why a tool refuses, or the last one that says anything."""
    lines = [line.strip("= \t") for line in said.splitlines() if line.strip("= \t")]
    why: Iterable[str] = (line for line in lines if any(refusal in line for refusal in REFUSALS))
    last = lines[-1] if lines else ("it does not end" if code is None else f"exit code {code}")
    return next(iter(why), last)[:200]


def failures(ends: dict[str, str]) -> int:
    return sum(end.startswith("failed") for end in ends.values())


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was run", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    heading = str(environment())
    print(heading, flush=True)
    runner = Runner(out, heading)
    missing = toolchain()
    runner.record("toolchain", f"failed: {missing}" if missing else "passed")
    if not missing:
        runner.run(STAGES)
    return failures(runner.ends)


if __name__ == "__main__":
    sys.exit(main())
