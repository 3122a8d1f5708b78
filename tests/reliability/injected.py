"""Errors raised from within a call: at its n-th torch operation, at its n-th line, or as an interrupt."""

import sys
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Injected(Exception):
    """An error that nothing else raises."""


class FailingOp(TorchDispatchMode):
    """Raises `error` instead of running torch operation number `at` (from 0, the profiler's own left out)."""

    def __init__(self, at=None, error=Injected):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace != "profiler"
        if func.namespace != "profiler" and self.count - 1 == self.at:
            raise self.error(f"injected at {func}")
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_line(at=None, error=KeyboardInterrupt, under="alps_kernels"):
    """Raises `error` before line number `at` (from 0) that runs in the package; yields a list with the count."""
    seen = [0]

    def local(frame, event, arg):
        if event == "line":
            seen[0] += 1
            if seen[0] - 1 == at:
                raise error("injected")
        return local

    def start(frame, event, arg):
        return local if f"/{under}/" in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(start)
    try:
        yield seen
    finally:
        sys.settrace(before)


def torch_oom(message):
    return torch.OutOfMemoryError(message)
