"""Record the kernel launches of host code, and compile them for a GPU that need not exist on this machine.

    with recorded() as launches:
        optimizer.step()                       # on CPU tensors, with backend "triton"
    built = launches[0].compile("sm_90")       # what this launch runs on an H100

Triton itself derives signature, alignment, constants and options from the arguments of the launch, as it does
on a GPU. So a test of `built` tests the binary that users run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from alps_kernels.ops.delta import projection

RUN = JITFunction.run


def target_of(name: str) -> GPUTarget:
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: its programs.
        args, options: its arguments by place and by name; options of the compiler are among the latter.
    """

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def argument(self, name: str) -> Any:
        """The value of an argument of the kernel."""
        if name in self.options:
            return self.options[name]
        return self.args[self.kernel.arg_names.index(name)]

    def with_options(self, **options: Any) -> Launch:
        """The same launch, but for these arguments by name."""
        return replace(self, options=self.options | options)

    def compile(self, target: str):
        """The `CompiledKernel` of this launch on a GPU such as "sm_90" or "gfx942", once per process."""
        with stand_in(target):
            return RUN(self.kernel, *self.args, grid=self.grid, warmup=True, **self.options)


@contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Note launches in place of making them: nothing is written, and the launch returns None.

    Args:
        target: host code sees the torch of this GPU's vendor (`torch.version.hip`), and whether it is a Hopper.
    """
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, grid, args, options))

    hip = torch.version.hip
    JITFunction.run, torch.version.hip = note, "6.4" if target.startswith("gfx") else None
    try:
        with mock.patch.object(projection, "is_hopper", lambda device: target == "sm_90"):
            yield launches
    finally:
        JITFunction.run, torch.version.hip = RUN, hip


@contextmanager
def stand_in(target: str) -> Iterator[None]:
    """Let Triton see this GPU as the current one. It can compile; it cannot launch."""
    before = driver._active
    # the device's name is the key under which Triton keeps the kernels of a device: one for each target
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: target, get_current_stream=lambda device: 0,
        get_current_target=lambda: target_of(target)))
    try:
        yield
    finally:
        driver._active = before
