"""Time several calls in one run: one after the other on a GPU, in turns on a CPU, whose cores others use too."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import measure, percentiles

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs its start and end
CUDA = torch.cuda.is_available()


class Unavailable(RuntimeError):
    """A baseline is not installed, or does not run on this device; the message names the reason."""


@dataclass
class Timed:
    """A call to time.

    Attributes:
        call: what is timed.
        facts: further columns of its row, known after the call.
        clock: measures the call, given it and the number of repeats; None: `bench.common.measure` on a GPU, turns on
            a CPU.
    """

    call: Callable[[], object]
    facts: Callable[[], dict] = dict
    clock: Callable[[Callable[[], object], int], dict] | None = None


def timed(builders: Mapping[str, Callable[[], Timed]], repeats: int = 7) -> Iterator[tuple[str, dict]]:
    """Time the call of every builder; yield its name and the columns of its row.

    A builder or call that fails costs its own row alone: the row is a note with the reason.

    Args:
        builders: prepare a call. On a GPU each is built in its turn and dropped after it, so that peak memory is
            its own, and its row is yielded at once. On a CPU all are built, every round runs each of them once,
            and the rows are yielded at the end.

    Yields:
        median_ms, p20_ms, p80_ms, peak_mib (what a call allocates at most on top of what is there), on a
        GPU launches, and the call's own facts; or a note alone.
    """
    if CUDA:
        for name, build in builders.items():
            yield name, _alone(build, repeats)
        return
    found: dict[str, dict] = {}
    ready: dict[str, Timed] = {}
    times: dict[str, list[float]] = {name: [] for name in builders}
    for name, build in builders.items():
        try:
            ready[name] = build()
            ready[name].call()
            ready[name].call()
        except Exception as error:
            ready.pop(name, None)
            found[name] = _lost(error)
    for _ in range(repeats):
        for name, one in [(name, one) for name, one in ready.items() if one.clock is None]:
            start = time.perf_counter()
            try:
                one.call()
            except Exception as error:
                del ready[name]
                found[name] = _lost(error)
            times[name].append((time.perf_counter() - start) * 1e3)
    for name, one in ready.items():
        try:
            took = one.clock(one.call, repeats) if one.clock else percentiles(times[name])
            found[name] = {**took, "peak_mib": allocated(one.call) / 2**20, **one.facts()}
        except Exception as error:
            found[name] = _lost(error)
    yield from ((name, found[name]) for name in builders)


def time_each(builders: Mapping[str, Callable[[], Timed]], repeats: int = 7) -> dict[str, dict]:
    """All of `timed`, by name."""
    return dict(timed(builders, repeats))


def _alone(build: Callable[[], Timed], repeats: int) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    try:
        one = build()
        one.call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one.call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        took = one.clock(one.call, repeats) if one.clock else measure(one.call, repeats=repeats)
        return {**took, "peak_mib": peak / 2**20, **_counted(one.call), **one.facts()}
    except torch.cuda.OutOfMemoryError:
        return {"note": "not run: out of memory"}
    except Exception as error:
        return _lost(error)


def _lost(error: Exception) -> dict:
    """The row of a call that failed."""
    if isinstance(error, Unavailable):
        return {"note": f"not run: {error}"}
    words = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return {"note": f"not run: {type(error).__name__}: {words[:200]}"}


def _counted(call: Callable[[], object]) -> dict:
    """The column `launches`; without it where the profiler does not run, which must not cost the time."""
    try:
        return {"launches": launches(call)}
    except Exception as error:
        print(f"launches not counted: {error}", flush=True)
        return {}


def allocated(call: Callable[[], object]) -> int:
    """Bytes that one call holds at most in CPU tensors of its own making, by the profiler's account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    now = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def launches(call: Callable[[], object]) -> int:
    """Kernels and copies that one call puts on the device, as the profiler counts the host's launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages()
               if "LaunchKernel" in event.key or "cudaMemcpyAsync" in event.key)


def rows_of(case: str, timings: Mapping[str, dict], bandwidth: float | None = None,
            against: str | None = None) -> list[dict]:
    """A row for every call; their ratios refer to `against`, or the first. See `row_of`."""
    reference = timings[against or next(iter(timings))].get("p20_ms")
    return [row_of(case, name, facts, bandwidth, reference) for name, facts in timings.items()]


def timed_rows(case: str, builders: Mapping[str, Callable[[], Timed]], repeats: int,
               bandwidth: float | None = None) -> Iterator[dict]:
    """The rows of `timed`, each as soon as it was measured; their ratios refer to the first."""
    reference = None
    for name, facts in timed(builders, repeats):
        if name == next(iter(builders)):
            reference = facts.get("p20_ms")
        yield row_of(case, name, facts, bandwidth, reference)


def row_of(case: str, name: str, facts: dict, bandwidth: float | None = None, reference: float | None = None) -> dict:
    """One row: speed, share of the copy bandwidth, time over the reference's.

    The ratio is of 20th percentiles, which other work on the machine disturbs least.
    """
    row = {"case": case, "rival": name, **facts}
    if "bytes" in facts and "median_ms" in facts and bandwidth:
        gbps = facts["bytes"] / facts["median_ms"] / 1e6
        row |= {"gbps": gbps, "copy_gbps": bandwidth, "share": gbps / bandwidth}
    if "p20_ms" in facts and reference:
        row["ratio"] = facts["p20_ms"] / reference
    return row
