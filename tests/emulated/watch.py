"""Watch the AdamW kernels in the emulator of PTX: which bytes they may touch, and what their requests move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from ptxemu import Config, emulated
from torch import Tensor

from alps_kernels.ops.adamw import op, plan
from alps_kernels.ops.adamw.tables import GRAD_COLUMN, Pointers

TABLES = ("tiles_ptr", "pointers_ptr", "hypers_ptr", "norm_ptr", "scale_ptr", "found_inf_ptr")
STATE = Pointers._fields[:9]  # those columns of the pointer table that are addresses


class WrongBytes(AssertionError):
    """A launch touched bytes that it should not, or left out some that it should."""


@contextmanager
def watched(target: str = "sm_80", approximation: str = "exact") -> Iterator:
    """Emulate launches; every step must read and write exactly the bytes that its blocks name.

    Tables and gradients may not be written, nor anything by the norm but its sums. Under `found_inf` nothing
    but tables may be touched.

    Yields:
        The emulator's session; `session.checked` counts steps.
    """
    with emulated(target, Config(approximation=approximation)) as session, pytest.MonkeyPatch.context() as patch:
        session.before, session.checked = prepare, 0
        updates_of, found, step = {}, op.Launches.plan, plan.Plan.step

        def planned(launches, key, updates, seed):
            made = found(launches, key, updates, seed)
            updates_of[made] = updates
            return made

        def checked(made, hypers, control):
            first = len(session.launches)
            step(made, hypers, control)
            check(session.launches[first:], made, updates_of[made], control.skips())
            session.checked += 1

        patch.setattr(op.Launches, "plan", planned)
        patch.setattr(plan.Plan, "step", checked)
        yield session
    assert not session.faults, "\n".join(dict.fromkeys(map(str, session.faults)))


def prepare(name: str, arguments: dict, memory) -> None:
    """Name the memory of a launch by its role, and protect what the kernel may only read."""
    fixed = set()
    for key in TABLES:
        if isinstance(arguments.get(key), Tensor):
            allocation = memory.at(arguments[key].data_ptr())
            allocation.name = key
            fixed.add(allocation.base)
    for row in arguments["pointers_ptr"].tolist():
        for role, address in zip(STATE, row, strict=False):
            if address:
                allocation = memory.at(address)
                allocation.name = role
                if role == "grad" or name == "head_grad_norm_kernel":
                    fixed.add(allocation.base)
    for allocation in memory.allocations:
        allocation.writable = allocation.base not in fixed
    if "partial_ptr" in arguments:
        memory.uninitialised(memory.at(arguments["partial_ptr"].data_ptr()).base)


def check(launches, made: plan.Plan, updates, skipped: bool) -> None:
    """Compare the bytes that launches touched with those that the blocks of the updates name."""
    memory, seen = launches[0].memory, {}
    for launch in launches:
        for base, (read, written) in launch.touched.items():
            name = launch.memory.at(base).name
            if name in TABLES:
                continue
            before = seen.get(base, (np.zeros_like(read), np.zeros_like(written), name))
            seen[base] = before[0] | read, before[1] | written, name
    wanted = ({}, {}) if skipped else footprint(made, updates, memory)
    for base in seen.keys() | wanted[0].keys() | wanted[1].keys():
        read, written, name = seen.get(base, (None, None, memory.at(base).name))
        for what, have, wish in (("read", read, wanted[0].get(base)), ("written", written, wanted[1].get(base))):
            have = np.zeros_like(wish) if have is None else have
            wish = np.zeros_like(have) if wish is None else wish
            if not np.array_equal(have, wish):
                raise WrongBytes(f"{name}: {int((have & ~wish).sum())} bytes {what} that no block names, "
                                 f"{int((wish & ~have).sum())} bytes not {what} that one names")


def footprint(made: plan.Plan, updates, memory) -> tuple[dict, dict]:
    """The bytes that a step reads and those that it writes: {address of an allocation: bool for each byte}."""
    read, written = {}, {}

    def mark(tensor: Tensor, cut, *into: dict, at: int = 0, stride: tuple = ()) -> None:
        """`at`, `stride`: of a tensor like this one."""
        at, size = at or tensor.data_ptr(), tensor.element_size()
        allocation = memory.at(at)
        flat = torch.arange(allocation.size // size).as_strided(
            tensor.shape, stride or tensor.stride(), (at - allocation.base) // size)
        places = cut(flat).reshape(-1).numpy()
        for one in into:
            mask = one.setdefault(allocation.base, np.zeros(allocation.size, bool))
            for i in range(size):
                mask[places * size + i] = True

    grads = list(made.pointers)[GRAD_COLUMN::len(Pointers._fields)]  # the host keeps no gradient, but its address
    for update, grad, layout in zip(updates, grads, made.layout, strict=True):
        for block in (None,) if update.blocks is None else update.blocks:
            shape = update.param.shape if block is None else block.of(update.param).shape
            whole = block is None
            mark(update.param, (lambda t: t) if whole else block.of, read, written)
            mark(update.param, (lambda t: t) if whole else block.of, read, at=grad, stride=layout[2])
            for tensor in (update.exp_avg, update.exp_avg_sq, update.max_exp_avg_sq, update.low):
                if tensor is not None:
                    mark(tensor, (lambda t: t) if whole else lambda t, b=block, s=shape: b.of_state(t, s), read, written)
            for tensor in update.scales or ():
                mark(tensor, (lambda t: t) if whole else lambda t, b=block, s=shape: b.of_scales(t, s), read, written)
            if update.weight_copy is not None:
                mark(update.weight_copy, block.of_copy, written)
    return read, written


def used(launch) -> float:
    """The part of its sectors that a launch asks for, of all data.

    A scale is loaded by all threads of its 64, from one address: its bytes count once.
    """
    asked = sectors = 0
    for (name, kind), row in launch.traffic.by_allocation().items():
        if name not in STATE:
            continue
        sectors += 32 * row["sectors"]
        touched = [seen[kind == "st"].sum() for base, seen in launch.touched.items() if launch.memory.at(base).name == name]
        asked += int(sum(touched)) if name.endswith("scale") else row["bytes"]
    return asked / sectors


def instructions(launch, n: int) -> float:
    """PTX instructions that the threads of a launch run, for each of its n elements."""
    return launch.instructions * 32 / n
