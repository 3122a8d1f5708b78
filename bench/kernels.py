"""GPU time of kernels alone: launches recorded from a call, repeated in a CUDA graph that events are put around.

Between the two events nothing waits for the host: the graph is on the device before it starts. The L2 cache is
not flushed between repeats, so calls on less than some 50 MB may be faster here than `bench.common.measure` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch

from bench.common import percentiles
from bench.timing import Timed, Unavailable

SPAN = 20.0  # ms that one measurement should last at least, so that the ends of it do not count
MOST = 64  # calls in one graph


@dataclass(frozen=True)
class Launch:
    """A launch of a Triton kernel that was recorded.

    Its arguments stay alive with it, and so does the call that it is from: tables hold addresses of what that owns.
    """

    call: Callable[[], object]
    run: Callable[..., object]
    kernel: object
    args: tuple
    options: dict  # the grid, constants and compiler options too

    def __call__(self) -> None:
        self.run(self.kernel, *self.args, **self.options)


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """Run a call once; return its Triton launches, to be repeated with the same arguments.

    The first call of a fresh optimizer goes through Triton's dispatch, which is where launches are recorded; later
    ones may launch the binary directly.

    Raises:
        Unavailable: it launched no Triton kernel.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def recording(run):
        def record(kernel, *args, **kwargs):
            found.append(Launch(call, run, kernel, args, kwargs))
            return run(kernel, *args, **kwargs)

        return record

    with ExitStack() as patches:
        for kind in (JITFunction, InterpretedFunction):
            patches.enter_context(patch.object(kind, "run", recording(kind.run)))
        call()
    if not found:
        raise Unavailable("the call launched no Triton kernel")
    return found


def alone(call: Callable[[], object], facts: Callable[[], dict] = dict,
          change: Callable[[Launch], Launch] = lambda launch: launch) -> Timed:
    """The kernels that a call launches, without everything else of it.

    Args:
        change: what to launch in the place of each.
    """
    launches = [change(launch) for launch in launches_of(call)]

    def repeat() -> None:
        for launch in launches:
            launch()

    return Timed(repeat, facts, gpu_time)


def with_tiles(tiles: int) -> Callable[[Launch], Launch]:
    """The change of a launch to this many tiles of the work list a program: constant TILES, and the grid with it."""

    def change(launch: Launch) -> Launch:
        n = launch.options["grid"][0] * launch.options["TILES"]
        return replace(launch, options={**launch.options, "grid": (-(-n // tiles), 1, 1), "TILES": tiles})

    return change


def captured(call: Callable[[], object], n: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of n calls, after three warm-up calls on another stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n):
            call()
    return graph


def gpu_time(call: Callable[[], object], repeats: int = 7) -> dict[str, float]:
    """Median, 20th and 80th percentile of the GPU time of one call, in ms: in a graph of many."""
    one = _between_events(call, 1)
    n = max(1, min(MOST, round(SPAN / max(one, 1e-3))))
    graph = captured(call, n)
    graph.replay()
    return percentiles([_between_events(graph.replay, 1) / n for _ in range(repeats)])


def replay_time(replay: Callable[[], object], repeats: int = 7) -> dict[str, float]:
    """The same of a graph that is there: events around many replays, so that the host is ahead of the device."""
    n = max(4, min(MOST, round(SPAN / max(_between_events(replay, 1), 1e-3))))
    return percentiles([_between_events(replay, n) / n for _ in range(repeats)])


def _between_events(call: Callable[[], object], n: int) -> float:
    """ms on the device from before the first to after the last of n calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
