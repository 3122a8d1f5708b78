"""Watch the scoring kernels in the emulator of PTX: what they may write, what they read, how close the scores are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ptxemu import Config, emulated

from alps_kernels.ops import METRICS
from alps_kernels.ops.delta import op

SUMMED = [name for name in METRICS if name != "pad_values"]
TOLERANCE = {"pad": 1e-6, "pad_index": 1e-6}  # relative, from long doubles; of the other metrics 2e-7
ROUGH = 5e-7  # of these, where instructions are off by all the error that they may have
# What a kernel may write; everything else is read-only. What of it nothing has written before the first launch.
WRITTEN = {"products": ("products_ptr",), "stats": ("stats_ptr",), "list": ("list_ptr", "carries_ptr", "sums_ptr"),
           "scan": ("sums_ptr",)}
FRESH = ("products_ptr", "stats_ptr", "list_ptr", "carries_ptr")


def pass_of(kernel: str) -> str:
    return next(name for name in WRITTEN if name in kernel)


@contextmanager
def watched(target: str = "sm_80", **config) -> Iterator:
    """Emulate the launches of one call; each may write what `WRITTEN` names, and read what is written.

    Yields:
        The emulator's session; `session.given` has what each launch was given, by the names of arguments.
    """
    with emulated(target, Config(**config)) as session, pytest.MonkeyPatch.context() as patch:
        fresh, session.given = set(), []

        def prepare(kernel, arguments, memory):
            session.given.append(arguments)
            at = {name: memory.at(value.data_ptr()) for name, value in arguments.items()
                  if isinstance(value, torch.Tensor)}
            for allocation in memory.allocations:
                allocation.writable = False
            for name, allocation in at.items():
                allocation.name = name
            for name in WRITTEN[pass_of(kernel)]:
                at[name].writable = True
                fresh.update({at[name].base} if name in FRESH else ())
            before = session.launches[-1].memory.fresh if session.launches else {}
            for base in fresh:
                memory.uninitialised(base)
                memory.fresh[base] = before.get(base, memory.fresh[base])

        session.before = prepare
        patch.setattr(op, "_of_one", lambda *_: pytest.fail("a head was left to the CPU backend"))
        yield session
    # Random errors are drawn for each thread: those that hold the same sum then store different ones, as no GPU does.
    faults = [fault for fault in session.faults
              if config.get("approximation") != "random" or "wrote two values" not in fault.detail]
    assert not faults, "\n".join(dict.fromkeys(map(str, faults)))


def close(found: dict, wanted: dict, tolerance: float = 2e-7) -> None:
    for name, values in found.items():
        error = float(((values - wanted[name]).abs() / wanted[name].abs()).max())
        assert error <= TOLERANCE.get(name, tolerance), (name, error)


def footprint(layers: Sequence) -> dict:
    """{address of a weight: bool for each byte, of those that heads read}."""
    masks = {}
    for side, s in ((getattr(s, name), s) for layer in layers for s in layer for name in ("base", "task")):
        storage, size = side.untyped_storage(), side.element_size()
        mask = masks.setdefault(storage.data_ptr(), np.zeros(storage.nbytes(), bool))
        places = torch.arange(storage.nbytes() // size).as_strided(side.shape, side.stride(), side.storage_offset())
        for i in range(size):
            mask[places[sorted(set(s.index))].flatten().numpy() * size + i] = True
    return masks
