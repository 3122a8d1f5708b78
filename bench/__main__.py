"""`python -m bench [NAME ...] [--quick] [OPTION ...]`: run the microbenchmarks, all or those named.

Each runs in a process of its own, as `python -m bench.bench_NAME`. `--quick` takes small cases, about
two minutes of one CPU core for all; other options go to every benchmark that is run.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
QUICK = {
    "adamw": "--layers 4 --ratio 0.1 1.0 --repeats 5",
    "counts": "--layers 2 --ratio 0.1",
    "curves": "--layers 3 --steps 6 --batch 4",
    "dw": "--shape SmolLM2-135M --ratio 0.1 --tokens 256 --repeats 3",
    "grad_norm": "--layers 4 --ratio 0.1 --repeats 5",
    "host": "--tensors 16 --repeats 20",
    "patch": "--repeats 3",
    "one_run": "--tiny --steps 8 --warmup 3 --test 16",
    "score": "--shape SmolLM2-135M --layers 2",
    "step": "--layers 2 --repeats 3",
    "stream": "--shape SmolLM2-135M --layers 2",
}


def main(argv: Sequence[str]) -> int:
    """Run each benchmark; the exit code is the number of those that did not end well."""
    if "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nNAME: {', '.join(NAMES)}; `python -m bench.bench_NAME --help` lists its options")
        return 0
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    names, options = list(argv[:first]), [word for word in argv[first:] if word != "--quick"]
    if unknown := [name for name in names if name not in NAMES]:
        print(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = 0
    for name in names or NAMES:
        chosen = [*(QUICK[name].split() if "--quick" in argv else ()), *options]
        print(f"== {name} {' '.join(chosen)}", flush=True)
        failed += bool(subprocess.run([sys.executable, "-m", f"bench.bench_{name}", *chosen], cwd=ROOT).returncode)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
