"""Launch the AdamW kernel at low overhead: pinned buffers for its tables, and the compiled binary itself."""

from __future__ import annotations

import ctypes
import functools
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..device import current_stream, keep_for_current_stream, new_event, pinned_bytes, send
from ..launching import launching
from .param_update import HyperRow
from .tables import Pointers, packed


class Stage:
    """Pinned memory and its place on the device, for the pointers and the hyperparameters of one step.

    Neither is written again before the kernel that read it last is through: the host waits for
    the event before it writes the pinned memory, another stream before it copies.

    Args:
        n_params: rows of the pointer table.
        capacity: rows of hyperparameters, at most.
    """

    def __init__(self, n_params: int, capacity: int, device: torch.device) -> None:
        self.device, self.capacity = device, capacity
        self.at = n_params * len(Pointers._fields) * 8  # a multiple of 16
        size = self.at + capacity * len(HyperRow._fields) * 4
        self.pinned = pinned_bytes(size, device)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self.buffer = (ctypes.c_char * size).from_address(self.pinned.data_ptr())
        self.pointers = self.there[:self.at].view(torch.int64).view(n_params, len(Pointers._fields))
        self.hypers = self.there[self.at:].view(torch.float32).view(capacity, len(HyperRow._fields))
        self.done = new_event(device)
        self.home = self.stream = current_stream(device)  # where the memory is from; where it was used last
        self.written: array | None = None
        self.captured = self.used = False

    def upload(self, pointers: array, rows: Sequence[HyperRow], stream: int) -> None:
        """Copy both tables to the device on `stream`, the current one; `pointers` must not change once it was given."""
        if self.done is not None and self.used:
            self.done.synchronize()
            if stream != self.stream:
                self.done.wait()
        self._write(pointers, rows)
        self.used_on(stream)

    def capture(self, pointers: array) -> None:
        """Let the graph that is captured copy the pointers, whenever it runs: nothing else may write them again."""
        self.captured = True
        self._write(pointers, ())

    def _write(self, pointers: array, rows: Sequence[HyperRow]) -> None:
        before, self.written = self.written, None  # until all of it is sent
        if before is not pointers:
            ctypes.memmove(self.buffer, pointers.buffer_info()[0], self.at)
        if rows:
            _floats(len(rows)).pack_into(self.buffer, self.at, *packed(rows))
        send(self.pinned, self.there)
        self.written = pointers

    def used_on(self, stream: int) -> None:
        """Kernels on `stream`, the current one, are about to read it."""
        self.stream, self.used = stream, True
        if stream != self.home:
            keep_for_current_stream(self.there)

    def launched(self) -> None:
        """The last kernel of the step that reads it was launched on the current stream."""
        if self.done is not None and not self.captured:
            self.done.record()


class KernelLaunch:
    """A kernel on `n` programs: through Triton's dispatch once, then through the binary that it came to.

    Triton's dispatch looks at every argument of every launch for 5 to 7 us; the binary takes 1.
    What it looks for cannot change between launches of one plan: dtypes, constants, options of the
    compiler, that every table lies at a multiple of 16 bytes and that numbers are floats. Where
    dispatch returns no binary (Triton's interpreter), and under a Triton whose binaries were not
    looked at, every launch goes through dispatch.
    """

    def __init__(self, kernel: Any, n: int, constants: dict[str, Any], options: dict[str, Any]) -> None:
        self.kernel, self.n, self.grid, self.options = kernel, n, (n, 1, 1), {**options, "enable_fp_fusion": False}
        self.constants, self.values = constants, tuple(constants.values())
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, *arguments: Tensor | float | None) -> None:
        key = tuple([argument is None for argument in arguments])
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled(*arguments, *self.values)
            return
        with launching():
            out = self.kernel[self.grid](*arguments, **self.constants, **self.options)
        if hasattr(out, "packed_metadata") and _binaries_are_known():
            self.compiled[key] = out[self.grid]


@functools.cache
def _floats(rows: int) -> struct.Struct:
    return struct.Struct(f"{rows * len(HyperRow._fields)}f")


@functools.cache
def _binaries_are_known() -> bool:
    """`CompiledKernel[grid](*arguments, *constants)` is a launch: read in Triton 3.6 and 3.9."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)
