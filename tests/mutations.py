"""Seeded faults: each must turn a named test red.

    python -m tests.mutations [NAME ...]     # all of them, or those named; exit code: survivors

A fault is a change of one piece of source text that stands exactly once. It is made in a copy of
the tree, never here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADAMW, DELTA = "tests/interpreted/test_head_adamw.py", "tests/interpreted/test_head_delta_kernel.py"
SCORES, STEPS, STATES = "tests/test_head_delta.py", "tests/test_optimizer.py", "tests/test_optimizer_state.py"


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `file`; `tests` (pytest arguments) must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def interpreted(self) -> bool:
        return self.tests[0].startswith("tests/interpreted")


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, file, old, new, tests)


NUMERICS, KERNEL, SCAN = "csrc_triton/numerics.py", "csrc_triton/head_adamw.py", "csrc_triton/head_delta.py"
TABLES, LAUNCH = "alps_kernels/ops/adamw_tables.py", "alps_kernels/ops/delta_tables.py"
PLAIN, MEANING = "alps_kernels/ops/reference_adamw.py", "alps_kernels/ops/reference_scoring.py"
FORMULA = (ADAMW, "-k", "formula")
SMALL = (DELTA, "-k", "small_differences or every_metric")

FAULTS = (
    # the AdamW kernel
    fault("weight decay is lost", NUMERICS, "    p = p * decay\n", "", *FORMULA),
    fault("eps is lost", NUMERICS, "root * inv_root2 + eps", "root * inv_root2", *FORMULA),
    fault("eps inside the root", NUMERICS, "        root = tl.sqrt_rn(v)\n", "        root = tl.sqrt_rn(v + eps)\n", *FORMULA),
    fault("second bias correction is missed", NUMERICS, "root * inv_root2 + eps", "root + eps", *FORMULA),
    fault("second moment of the plain gradient", NUMERICS, "weight2 * g * g", "weight2 * g", *FORMULA),
    fault("low half of the master is not read", NUMERICS, "(high + low.to(tl.int32))", "high", ADAMW, "-k", "split_master"),
    fault("master is truncated, not rounded", NUMERICS, "(bits + 0x8000) >> 16", "bits >> 16", ADAMW, "-k", "split_master"),
    fault("skip flag is ignored", KERNEL, "if tl.load(control_ptr + 1) != 0.0:", "if tl.load(control_ptr + 1) == 7.0:",
          ADAMW, "-k", "skip_flag"),
    fault("gradients are not unscaled", KERNEL, "factor *= tl.load(control_ptr)", "factor *= 1.0", ADAMW, "-k", "scaling"),
    fault("maximize is ignored", KERNEL, "factor = tl.load(hypers + 7)", "factor = 1.0", ADAMW, "-k", "maximize"),
    fault("a tile writes past its end", KERNEL, "(rows * COLS + cols < limit)\n    wide_rows",
          "(rows * COLS + cols < limit + 1)\n    wide_rows", ADAMW, "-k", "canaries or odd or formula"),
    fault("kahan compensation has the wrong sign", KERNEL, "master - wide, 0.0)\n", "wide - master, 0.0)\n", ADAMW, "-k", "kahan or test_head_adamw"),
    fault("gradient norm forgets to square", KERNEL, "tl.sum(g * g, 1)", "tl.sum(g, 1)", ADAMW, "-k", "gradient_norm"),
    fault("the work list ends early", TABLES, "(n - at).clamp(max=ROWS * COLS)", "(n - 1 - at).clamp(max=ROWS * COLS)",
          "tests/test_adamw_tables.py", "-k", "exactly_once"),
    # the scoring kernels
    fault("carry between tiles is lost", SCAN, " + tl.load(carry_ptr + slot)", "", *SMALL),
    fault("the mean shift r is forgotten", SCAN, "moved = expm1(d * inv_tau) - r", "moved = expm1(d * inv_tau)", *SMALL),
    fault("moves are not weighted", SCAN, "tl.sum(e * expm1(d * inv_tau), axis=0)", "tl.sum(expm1(d * inv_tau), axis=0)", *SMALL),
    fault("the task's row stride is the base's", SCAN, "r * tl.load(segment + 5)", "r * tl.load(segment + 3)",
          DELTA, "-k", "strides_of_its_own"),
    fault("change of k and v is left out", SCAN, "        dw = tl.dot(qb_rows, md, acc=dw, input_precision=PRECISION)\n", "",
          DELTA, "-k", "projection"),
    fault("change of q meets the base's k and v", SCAN, "tl.dot(tl.trans(qt - qb), mt,", "tl.dot(tl.trans(qt - qb), mb,",
          DELTA, "-k", "projection"),
    fault("a coarse expm1", NUMERICS, "(0.5 + x * (0.16666667 + x * 0.041666668))", "0.5", *SMALL),
    fault("a wrong sign in the KL series", NUMERICS, "small = d * d * (0.5 - d * s)", "small = d * d * (0.5 + d * s)", *SMALL),
    fault("carries include their own tile", LAUNCH, "change.cumsum(1) - change", "change.cumsum(1)", *SMALL),
    fault("segments share their slots", LAUNCH, "first_slot = first_slot + len(start)", "first_slot = first_slot + 0",
          DELTA, "-k", "grouped"),
    fault("layers share their groups", LAUNCH, "first + pairs[pair]", "pairs[pair]", DELTA, "-k", "projection"),
    # what they mean
    fault("r is added", MEANING, "addcmul_(weight, r, value=-1)", "addcmul_(weight, r, value=1)", SCORES, "-k", "every_metric"),
    fault("a wrong term of the KL series", MEANING, "(30, 20, 12, 6, 2)", "(30, 20, 12, 7, 2)", SCORES, "-k", "every_metric"),
    fault("change of v is left out", MEANING, " + k_base @ (v_task - v_base).mT", "", SCORES, "-k", "projection_is_exact"),
    fault("weight decay only where there is none", PLAIN, "if hyper.decay != 1.0:", "if hyper.decay == 1.0:",
          STEPS, "-k", "50_steps"),
    fault("bias correction is skipped", PLAIN, "    torch._foreach_div_(roots, hyper.root2)\n", "", STEPS, "-k", "50_steps"),
    fault("steps count twice", "alps_kernels/optimizer.py", "torch._foreach_add_(steps, 1 if", "torch._foreach_add_(steps, 2 if",
          STEPS, "-k", "50_steps"),
    fault("loading casts to the parameter's dtype", "alps_kernels/state.py", "to(device=slot.param.device, dtype=dtype)",
          "to(device=slot.param.device, dtype=slot.param.dtype)", STATES, "-k", "resume"),
    # which heads, and where
    fault("adjacent ranges are not merged", "alps_kernels/binding.py", "start <= merged[-1][1]", "start < merged[-1][1]",
          "tests/test_selection.py", "-k", "merge or bind"),
    fault("kv policy all is any", "alps_kernels/binding.py", 'if kv == "any":', 'if kv != "none":', "tests/test_selection.py"),
    fault("K is rounded down", "alps_kernels/selection.py", "math.ceil(round(ratio * n, 9))", "math.floor(round(ratio * n, 9))",
          "tests/test_selection.py", "-k", "top_count"),
    fault("the output projection is read transposed", "alps_kernels/layout.py", 'natural = 1 if self.role == "o"',
          'natural = 0 if self.role == "o"', "tests/test_scoring.py", "-k", "representation"),
)


def applied(fault: Fault, root: Path) -> str:
    """The mutated text of the fault's file.

    Raises:
        ValueError: its text does not stand there exactly once: the fault is stale.
    """
    text = (root / fault.file).read_text()
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {fault.file}")
    return text.replace(fault.old, fault.new)


def survives(fault: Fault) -> bool:
    """Whether the fault's tests pass all the same."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", "*.egg-info", ".*_cache"))
        (copy / fault.file).write_text(applied(fault, copy))
        environment = {**os.environ, "PYTHONPATH": str(copy), "TRITON_INTERPRET": str(int(fault.interpreted)),
                       "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests],
                             cwd=copy, env=environment, capture_output=True, text=True)
        if ran.returncode not in (0, 1):  # 1: tests ran and some failed
            raise RuntimeError(f"{fault.name}: its tests did not run:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        return ran.returncode == 0


def main(names: list[str]) -> int:
    chosen = [f for f in FAULTS if not names or f.name in names]
    survivors = 0
    for i, each in enumerate(chosen, 1):
        alive = survives(each)
        survivors += alive
        print(f"{i:3d}/{len(chosen)}  {'SURVIVES' if alive else 'seen':9s} {each.name}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults turn a test red")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
