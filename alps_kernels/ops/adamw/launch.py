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

from .param_update import HyperRow
from .tables import Pointers, packed


class Stage:
    """Pinned memory and its place on the device, for the pointers and the hyperparameters of one step.

    Neither is written again before the kernel that read it last is through: the host waits for
    the event before it writes the pinned memory, the stream before it copies.

    Args:
        n_params: rows of the pointer table.
        capacity: rows of hyperparameters, at most.
    """

    def __init__(self, n_params: int, capacity: int, device: torch.device) -> None:
        self.capacity, cuda = capacity, device.type == "cuda"
        self.at = n_params * len(Pointers._fields) * 8  # a multiple of 16
        size = self.at + capacity * len(HyperRow._fields) * 4
        self.pinned = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self.buffer = (ctypes.c_char * size).from_address(self.pinned.data_ptr())
        self.pointers = self.there[:self.at].view(torch.int64).view(n_params, len(Pointers._fields))
        self.hypers = self.there[self.at:].view(torch.float32).view(capacity, len(HyperRow._fields))
        self.done = torch.cuda.Event() if cuda else None
        self.written: array | None = None

    def upload(self, pointers: array, rows: Sequence[HyperRow] = (), *, captured: bool = False) -> None:
        """Copy both tables to the device; `pointers`, row after row, must not change once it was given.

        Args:
            captured: a CUDA graph is captured, which will copy from the pinned memory as it is
                now: nothing waits, and the caller never writes it again.
        """
        if self.done is not None and not captured:
            self.done.synchronize()
            self.done.wait()
        if self.written is not pointers:
            ctypes.memmove(self.buffer, pointers.buffer_info()[0], self.at)
            self.written = pointers
        if rows:
            values = packed(rows)
            struct.pack_into(f"{len(values)}f", self.buffer, self.at, *values)
        self.there.copy_(self.pinned, non_blocking=True)

    def used(self) -> None:
        """The kernel that reads this stage was launched on the current stream."""
        if self.done is not None:
            self.done.record()


class KernelLaunch:
    """A kernel on a grid: through Triton's dispatch once, then through the binary that it came to.

    Triton's dispatch looks at every argument of every launch for 5 to 7 us; the binary takes 1.
    What it looks for cannot change between launches of one plan: dtypes, constants, and that
    every table lies at a multiple of 16 bytes. Where dispatch returns no binary (Triton's
    interpreter), and under a Triton whose binaries were not looked at, every launch goes through
    dispatch.
    """

    def __init__(self, kernel: Any, n: int, constants: dict[str, Any], num_warps: int) -> None:
        self.kernel, self.grid, self.constants, self.num_warps = kernel, (n, 1, 1), constants, num_warps
        self.compiled: dict[tuple, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        key = tuple([t is None for t in tensors])
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled(*tensors, *self.constants.values())
            return
        out = self.kernel[self.grid](*tensors, **self.constants, num_warps=self.num_warps, enable_fp_fusion=False)
        if hasattr(out, "packed_metadata") and _binaries_are_known():
            self.compiled[key] = out[self.grid]


@functools.cache
def _binaries_are_known() -> bool:
    """`CompiledKernel[grid](*arguments, *constants)` is a launch: read in Triton 3.6 and 3.9."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return (3, 6) <= (major, minor) <= (3, 9)
