"""A stand-in for CUDA's driver: CPU tensors count as a device's, and all that the host asks of it is logged.

    with driver() as log:
        optimizer.step()
    log.names()                      # ["copy", "launch head_adamw_kernel", "record"]

Nothing is computed. Each launch is held to what the kernel may take: every argument in its place, tables at
multiples of 16 bytes, pinned memory that no later step has overwritten, and the address of every gradient in
the table. `log.captured()` begins a capture: copies wait for `log.replay()`, as those of a CUDA graph do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import csrc_triton.head_adamw as real
from alps_kernels.ops import device as devices
from alps_kernels.ops.adamw import launch, op, plan
from alps_kernels.ops.adamw.tables import Pointers

GRAD = Pointers._fields.index("grad")


@dataclass
class Log:
    """What the host asked for, in order: (name, what it is about)."""

    events: list[tuple[str, Any]] = field(default_factory=list)
    stream: int = 0
    capturing: bool = False
    checks: bool = True
    graph: list[tuple] = field(default_factory=list)  # of the last capture
    grads: list[torch.Tensor] = field(default_factory=list)  # whose addresses a launch must find in its table, if any

    def names(self) -> list[str]:
        return [f"{name} {about}" if name == "launch" else name for name, about in self.events]

    def count(self) -> Counter:
        return Counter(name for name, _ in self.events)

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def captured(self) -> Iterator[None]:
        self.capturing, self.graph = True, []
        try:
            with self.on_stream(99):
                yield
        finally:
            self.capturing = False

    def replay(self, grads: list[torch.Tensor]) -> None:
        """The copies and launches of the last capture; their tables must name these gradients."""
        for kind, *rest in self.graph:
            if kind == "copy":
                rest[1].copy_(rest[0])
            else:
                check_gradients(*rest, grads)

    # -- what the package calls --

    def send(self, pinned: torch.Tensor, there: torch.Tensor) -> None:
        self.events.append(("copy", pinned.numel()))
        if self.capturing:
            self.graph.append(("copy", pinned, there))
        else:
            there.copy_(pinned)

    def launch(self, name: str, names: list[str], values: tuple, grid: tuple[int, ...]) -> None:
        self.events.append(("launch", name))
        if not self.checks:
            return
        arguments = dict(zip(names, values, strict=True))
        check_arguments(name, arguments, grid)
        if self.capturing:
            self.graph.append(("launch", arguments["pointers_ptr"]))
        elif self.grads:
            check_gradients(arguments["pointers_ptr"], self.grads)


class Event:
    def __init__(self, log: Log) -> None:
        self.log = log

    def note(self, name: str) -> None:
        if self.log.capturing:
            raise RuntimeError(f"event.{name} is not permitted while a stream is capturing")
        self.log.events.append((name, None))

    def record(self) -> None:
        self.note("record")

    def wait(self) -> None:
        self.note("wait")

    def synchronize(self) -> None:
        self.note("synchronize")


class Kernel:
    """A kernel under Triton's dispatch; its binary then takes all arguments by place, constants too."""

    packed_metadata = None

    def __init__(self, log: Log, name: str) -> None:
        self.log, self.name, self.arg_names = log, name, getattr(real, name).arg_names

    def __getitem__(self, grid: tuple[int, ...]):
        def dispatch(*args: Any, num_warps: int, enable_fp_fusion: bool, maxnreg: int = 0, **constants: Any) -> Kernel:
            assert enable_fp_fusion is False and self.arg_names[:len(args)] + list(constants) == self.arg_names
            self.log.launch(self.name, self.arg_names, (*args, *constants.values()), grid)
            return Binary(self)

        return dispatch


class Binary:
    packed_metadata = None

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        kernel = self.kernel
        return lambda *args: kernel.log.launch(kernel.name, kernel.arg_names, args, grid)


def check_arguments(name: str, arguments: dict[str, Any], grid: tuple[int, ...]) -> None:
    tiles, pointers = arguments["tiles_ptr"], arguments["pointers_ptr"]
    assert tiles.dtype == pointers.dtype == torch.int64 and tiles.shape[1] == real.TILE_FIELDS.value
    assert pointers.shape[1] == real.POINTER_FIELDS.value
    assert grid[1:] == (1, 1) and len(tiles) >= grid[0] * arguments["TILES"] > len(tiles) - 8 * 2 - arguments["TILES"]
    for key in ("tiles_ptr", "pointers_ptr", "hypers_ptr", "partial_ptr"):
        assert arguments.get(key) is None or arguments[key].data_ptr() % 16 == 0, key
    if name == "head_adamw_kernel":
        assert arguments["hypers_ptr"].dtype == torch.float32 and type(arguments["max_norm"]) is float
        assert arguments["norm_ptr"] is None or arguments["norm_ptr"].dtype == torch.float64
        for key in ("scale_ptr", "found_inf_ptr"):
            assert arguments[key] is None or arguments[key].dtype == torch.float32, key
    else:
        assert arguments["partial_ptr"].shape == (grid[0],) and arguments["partial_ptr"].dtype == torch.float64


def check_gradients(pointers: torch.Tensor, grads: list[torch.Tensor]) -> None:
    assert pointers[:, GRAD].tolist() == [grad.data_ptr() for grad in grads], "the kernel would read other gradients"


@contextmanager
def driver(checks: bool = True) -> Iterator[Log]:
    """CPU tensors count as a device's.

    Args:
        checks: launches are held to what the kernels may take; without, they cost nothing.
    """
    log = Log(checks=checks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_streams", lambda device: True)
        patch.setattr(devices, "_raw_stream", lambda index: log.stream)
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: log.capturing)
        patch.setattr(launch, "pinned_bytes", lambda size, device: pinned(log, size))
        patch.setattr(launch, "new_event", lambda device: Event(log))
        patch.setattr(launch, "send", log.send)
        for module in (launch, plan):
            patch.setattr(module, "keep_for_current_stream", lambda tensor: log.events.append(("keep", tensor)))
        patch.setattr(op, "runs_kernels", lambda tensor: True)
        code = SimpleNamespace(**{name: Kernel(log, name) for name in ("head_adamw_kernel", "head_grad_norm_kernel")})
        patch.setattr(plan, "device_code", lambda name: code)
        yield log


def pinned(log: Log, size: int) -> torch.Tensor:
    if log.capturing:
        raise RuntimeError("pinned memory is not to be had while a stream is capturing")
    return torch.empty(size, dtype=torch.uint8)
