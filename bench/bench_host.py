"""The host's time of a warm optimizer step of many small tensors, beside what reading their gradients takes.

    python -m bench.bench_host [--tensors N] [--repeats N]

The first row reads every parameter's gradient, its address and its version in plain Python: what a step that checks
its gradients cannot do without. The ratio of the other rows is their time over that. Every call starts with an idle
device, and ends when the call returns, not when the device is through. "Moved": every gradient lies elsewhere than at
the step before. Launches: kernels and copies of one call. On a CPU the steps compute, too, so their times say nothing
of a GPU's host.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam, BoundSelection, HeadSelection
from bench.attention import DEVICE
from bench.baselines import OPTIONS
from bench.common import percentiles, table, write_each
from bench.kernels import captured
from bench.timing import Timed, timed_rows

READ = "gradients, addresses and versions read"


class Tensors:
    """Parameters of which some rows or columns train, and two sets of gradients for them."""

    def __init__(self, n: int) -> None:
        self.params = [nn.Parameter(torch.randn(64, 64, device=DEVICE).bfloat16()) for _ in range(n)]
        parts = (BoundParam(f"p{i}", p, i % 2, ((8, 24),)) for i, p in enumerate(self.params))
        self.bound = BoundSelection(HeadSelection([], []), tuple(parts), "frozen", None)
        self.sets = itertools.cycle([[torch.randn_like(p) for p in self.params] for _ in range(2)])
        self.move()

    def move(self) -> None:
        """Give every parameter the other set's gradient."""
        for param, grad in zip(self.params, next(self.sets), strict=True):
            param.grad = grad

    def read(self) -> tuple[list[Tensor], list[int], list[int]]:
        grads = [p.grad for p in self.params]
        return grads, [grad.data_ptr() for grad in grads], [grad._version for grad in grads]


def host_time(before: Callable[[], object], samples: int, call: Callable[[], object],
              repeats: int = 0) -> dict[str, float]:
    """Percentiles of the time until a call returns, in ms; `before` each of them, and an idle device."""
    times = []
    for _ in range(samples):
        before()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return percentiles(times)


def step(tensors: Tensors, samples: int, moved: bool = False, **options) -> Timed:
    optimizer = HeadAdamW(tensors.params, heads=tensors.bound, **options, **OPTIONS)
    return Timed(optimizer.step, dict, partial(host_time, tensors.move if moved else _nothing, samples))


def replay(tensors: Tensors, samples: int) -> Timed:
    """A captured graph of the step: one call of the driver."""
    optimizer = HeadAdamW(tensors.params, heads=tensors.bound, capturable=True, **OPTIONS)
    graph = captured(optimizer.step)
    return Timed(graph.replay, lambda: {"note": f"of {len(optimizer.state)} tensors"},  # keeps the optimizer alive
                 partial(host_time, _nothing, samples))


def fused(tensors: Tensors, samples: int) -> Timed:
    optimizer = torch.optim.AdamW(tensors.params, fused=True, **OPTIONS)
    return Timed(optimizer.step, lambda: {"note": "over all of every tensor"}, partial(host_time, _nothing, samples))


def _nothing() -> None:
    pass


def run(n: int, samples: int) -> Iterator[dict]:
    tensors = Tensors(n)
    builders: dict[str, Callable[[], Timed]] = {
        READ: lambda: Timed(tensors.read, dict, partial(host_time, _nothing, samples)),
        "HeadAdamW": partial(step, tensors, samples),
        "HeadAdamW, gradients moved": partial(step, tensors, samples, moved=True),
        "HeadAdamW, clipped": partial(step, tensors, samples, max_grad_norm=1.0),
        "HeadAdamW, clipped, gradients moved": partial(step, tensors, samples, moved=True, max_grad_norm=1.0),
        "torch AdamW fused": partial(fused, tensors, samples),
    }
    if DEVICE == "cuda":
        builders["HeadAdamW, replay of a captured graph"] = partial(replay, tensors, samples)
    case = f"host's time, {n} tensors of 64 x 64, bfloat16"
    if DEVICE != "cuda":
        case += ", steps that compute on the CPU: nothing of a GPU's host"
    return timed_rows(case, builders, samples)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args(argv)
    rows, path = write_each("host", run(args.tensors, args.repeats))
    table(rows, ("rival", "median_ms", "p20_ms", "p80_ms", "ratio", "launches", "note"))
    print(path)
    if lost := [f"{row['rival']}: {row['note']}" for row in rows if "median_ms" not in row]:
        raise SystemExit("\n".join(["no time", *lost]))


if __name__ == "__main__":
    main()
