"""`python -m bench [NAME ...]`: run the microbenchmarks, all or those named (score, adamw, stream)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(argv: Sequence[str]) -> int:
    """Run each benchmark; the exit code is the number of those that did not end well."""
    if unknown := [name for name in argv if name not in NAMES]:
        print(f"no benchmark is called {unknown[0]!r}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    failed = 0
    for name in argv or NAMES:
        print(f"== {name}", flush=True)
        try:
            import_module(f"bench.bench_{name}").main([])
        except SystemExit as stopped:  # a red parity gate, or arguments
            failed += bool(stopped.code)
            print(stopped.code or "", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
