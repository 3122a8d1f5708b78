"""Calls timed in one run: one after the other on a GPU, in turns on a CPU, whose cores others use too."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from bench.common import measure, percentiles

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own comings and goings
CUDA = torch.cuda.is_available()


class Unavailable(RuntimeError):
    """A baseline is not installed, or does not run on this device; the message says which."""


@dataclass
class Timed:
    """A call to time, and further columns of its row, known after it."""

    call: Callable[[], object]
    facts: Callable[[], dict] = dict


def time_each(builders: Mapping[str, Callable[[], Timed]], repeats: int = 7) -> dict[str, dict]:
    """Time the call of every builder; the columns of its row by name.

    Args:
        builders: prepare a call. On a GPU each is built when its turn comes and dropped after it, so that peak
            memory is its own; on a CPU all are built, and every round runs each of them once.

    Returns:
        median_ms, p20_ms, p80_ms, peak_mib (what a call allocates at most on top of what is there), on a
        GPU launches, and the call's own facts; only a note of one that cannot run here.
    """
    if CUDA:
        return {name: _alone(build, repeats) for name, build in builders.items()}
    found: dict[str, dict] = {}
    ready: dict[str, Timed] = {}
    for name, build in builders.items():
        try:
            ready[name] = build()
            ready[name].call()
            ready[name].call()
        except Unavailable as error:
            found[name] = {"note": f"not run: {error}"}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, timed in ready.items():
            start = time.perf_counter()
            timed.call()
            times[name].append((time.perf_counter() - start) * 1e3)
    found |= {name: {**percentiles(times[name]), "peak_mib": allocated(timed.call) / 2**20, **timed.facts()}
              for name, timed in ready.items()}
    return {name: found[name] for name in builders}


def _alone(build: Callable[[], Timed], repeats: int) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    try:
        timed = build()
        timed.call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed.call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return {**measure(timed.call, repeats=repeats), "peak_mib": peak / 2**20, "launches": launches(timed.call),
                **timed.facts()}
    except Unavailable as error:
        return {"note": f"not run: {error}"}
    except torch.cuda.OutOfMemoryError:
        return {"note": "not run: out of memory"}


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
    """A row for every call: its speed, its share of the copy bandwidth, its time over that of `against`, or the first.

    The ratio is of 20th percentiles, which other work on the machine disturbs least.
    """
    reference, rows = timings[against or next(iter(timings))].get("p20_ms"), []
    for name, facts in timings.items():
        row = {"case": case, "rival": name, **facts}
        if "bytes" in facts and "median_ms" in facts and bandwidth:
            gbps = facts["bytes"] / facts["median_ms"] / 1e6
            row |= {"gbps": gbps, "copy_gbps": bandwidth, "share": gbps / bandwidth}
        if "p20_ms" in facts and reference:
            row["ratio"] = facts["p20_ms"] / reference
        rows.append(row)
    return rows
