"""One AdamW step on the selected slices of many weights: checks, tables, grid and launch."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..device import device_code, on_device, triton_type
from . import cpu
from .launch import KernelLaunch, Stage
from .param_update import HyperTable, ParamUpdate
from .tables import TILE, VECTOR, WIDE, Pointers, aligned, packed_on_device, pointers_of, tiles_of, with_grads

RING = 4  # steps whose tables may be on their way at once
WARPS = {True: 4, False: 8}  # of the aligned and the unaligned variant: an address for each element takes registers


def head_adamw_(updates: Sequence[ParamUpdate], hypers: HyperTable, *, control: Tensor | None = None, seed: int = 0,
                launches: Launches | None = None, backend: str | None = None) -> None:
    """One AdamW step, in place; `oracle.head_adamw_` says what that is.

    All tables are made before the first launch. One launch for every (device, param, grad,
    state) dtype tuple; tensors that the kernel cannot address (float64, rows that are not
    contiguous) go to the CPU backend, which advances `ParamUpdate.step` of its parameters. Those of
    the kernel are for the caller to advance, unless a later launch fails.

    Args:
        updates: parameters of any dtypes, on any devices, whose shapes fit.
        hypers: of this step.
        control: [2] float32: what gradients are multiplied by, and whether (not zero) nothing
            may move.
        seed: of stochastic rounding, below 2^64.
        launches: where the tables of earlier steps are kept for the next; the same list of
            updates then means that nothing but hyperparameters changed since.
        backend: "triton" to run the kernel whatever the device (in Triton's interpreter),
            "torch" never to; default: the kernel on CUDA.
    """
    launches = launches if launches is not None else Launches()
    plans = launches.of(updates, seed, backend)
    if launches.plain:
        cpu.head_adamw_(launches.plain, hypers, control=control, seed=seed)
    for done, plan in enumerate(plans):
        try:
            plan.step(hypers, control)
        except BaseException:
            steps = [updates[i].step for moved in plans[:done] for i in moved.members]
            if steps and steps[0] is not None:
                torch._foreach_add_(steps, 1 if control is None else (control[1] == 0).to(steps[0]))
            raise


def head_grad_norm(updates: Sequence[ParamUpdate], *, seed: int = 0, launches: Launches | None = None,
                   backend: str | None = None) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone, a float64 scalar.

    Deterministic: partial sums of tiles in float32, added up in float64 in a fixed order.
    """
    launches = launches if launches is not None else Launches()
    plans = launches.of(updates, seed, backend)
    squares = [cpu.head_grad_norm(launches.plain).square()] if launches.plain or not plans else []
    squares += [plan.grad_square() for plan in plans]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


class Launches:
    """Which update goes into which launch, and the tables of each launch, kept from step to step."""

    def __init__(self) -> None:
        self.plain: list[ParamUpdate] = []  # those of the CPU backend
        self.current: list[Plan] = []
        self._plans: dict[tuple, Plan] = {}
        self._captured: list[Plan] = []  # a CUDA graph reads their tables for as long as it lives
        self._known: tuple = (None, None, None)

    @property
    def outdated(self) -> bool:
        """The next step will look at the gradients themselves, not at addresses that are known."""
        return bool(self.plain) or self._known[0] is None

    def for_others(self) -> Launches:
        """Empty, for other updates; what a CUDA graph may still read stays."""
        fresh = Launches()
        fresh._captured = self._captured + [plan for plan in self._plans.values() if plan.captured]
        return fresh

    def moved(self, grads: Sequence[int] = ()) -> None:
        """The updates changed; `grads`: in nothing but the addresses of their gradients, which are these."""
        updates = self._known[0]
        if not grads or updates is None or not all(plan.move([grads[i] for i in plan.members])
                                                   for plan in self.current):
            self._known = (None, None, None)

    def of(self, updates: Sequence[ParamUpdate], seed: int, backend: str | None) -> list[Plan]:
        """The launches of these updates; `plain` then holds those for the CPU backend."""
        known, at_seed, on_backend = self._known
        if known is updates and at_seed == seed and on_backend == backend:
            return self.current
        if backend not in (None, "triton", "torch"):
            raise ValueError(f"backend is {backend!r}; expected 'triton', 'torch' or None")
        plain, grouped = [], defaultdict(list)
        for index, update in enumerate(updates):
            if backend == "torch" or (backend is None and not update.param.is_cuda) or not update.launchable:
                plain.append(update)
            elif update.exp_avg.numel():
                grouped[update.launch_key].append(index)
        self.current = [self.plan(key, [updates[i] for i in members], seed) for key, members in grouped.items()]
        for plan, members in zip(self.current, grouped.values(), strict=True):
            plan.members = members
        self.plain, self._known = plain, (updates, seed, backend)
        return self.current

    def plan(self, key: tuple, updates: list[ParamUpdate], seed: int) -> Plan:
        """The tables of this launch, those of an earlier step where they still hold."""
        known = self._plans.get(key)
        layout = [(u.param.shape, u.param.stride(), u.grad.stride(), u.blocks, u.n_rows,
                   None if u.weight_copy is None else u.weight_copy.stride()) for u in updates]
        pointers = [pointers_of(u, seed) for u in updates]
        if known is not None and known.layout == layout and known.point(pointers):
            return known
        if known is not None and known.captured:
            self._captured.append(known)
        made = self._plans[key] = Plan(updates, layout, pointers)
        return made


class Plan:
    """The tables of one launch.

    The work list is built once. Where the host counts steps, addresses and hyperparameters go to the
    device together, through a ring of pinned buffers, so that no step waits for another. Where
    the device counts them, addresses go there when one changed, and the hyperparameters are there.
    """

    def __init__(self, updates: list[ParamUpdate], layout: list[tuple], pointers: list[Pointers]) -> None:
        first = updates[0]
        self.layout, self.device = layout, first.param.device
        self.pointers = array("q", chain.from_iterable(pointers))
        self.n_params, self.members = len(updates), list(range(len(updates)))  # places among all updates of a step
        self.on_device = first.counts_on_device
        tiles = [tiles_of(update, index) for index, update in enumerate(updates)]
        self.fits = [aligned(rows, row) for rows, row in zip(tiles, pointers, strict=True)]
        # Tensors that cannot be read 16 bytes at a time, if there are any, take a launch of their own.
        self.tiles = [(torch.cat(rows).to(self.device), hint) for hint in (True, False)
                      if (rows := [t for t, fit in zip(tiles, self.fits, strict=True) if fit == hint])]
        code, grad = device_code("head_adamw"), {"GRAD": triton_type(first.grad.dtype)}
        kind = {"PARAM": triton_type(first.param.dtype), **grad, "MOMENT": triton_type(first.exp_avg.dtype),
                "MASTER": first.master, "AMSGRAD": first.max_exp_avg_sq is not None,
                "WEIGHT_COPY": any(u.weight_copy is not None for u in updates)}
        self.launches = []  # of the step and of the norm, for each of `tiles`
        for rows, hint in self.tiles:
            tile = {"ALIGNED": hint, "GROUPS": TILE // VECTOR}
            self.launches.append((KernelLaunch(code.head_adamw_kernel, len(rows), {**kind, **tile}, WARPS[hint]),
                                  KernelLaunch(code.head_grad_norm_kernel, len(rows), {**grad, **tile}, WARPS[hint])))
        self.captured = False
        self.ring: list[Stage] = []
        self.turn = 0

    def point(self, pointers: list[Pointers]) -> bool:
        """Take these addresses; False where this plan cannot."""
        flat = array("q", chain.from_iterable(pointers))
        if flat == self.pointers:
            return True
        still = (not fit or not any(row[i] % 16 for i in WIDE) for fit, row in zip(self.fits, pointers, strict=True))
        if self.captured or not all(still):
            return False
        self.pointers = flat
        return True

    def move(self, grads: list[int]) -> bool:
        """Take these addresses of the gradients; False where this plan cannot."""
        if self.captured or any([fit and grad & 15 for fit, grad in zip(self.fits, grads, strict=True)]):
            return False
        self.pointers = with_grads(self.pointers, grads)
        return True

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _stage(self, rows: int) -> Stage:
        """The next of the ring, with room for this many rows of hyperparameters."""
        if not self.ring or self.ring[0].capacity < rows:
            depth = RING if self.device.type == "cuda" and not self.on_device else 1
            self.ring = [Stage(self.n_params, 2 * rows, self.device) for _ in range(depth)]
        self.turn = (self.turn + 1) % len(self.ring)
        return self.ring[self.turn]

    def _pointed(self) -> Stage:
        """A stage whose pointer table is current on the device; it was given no hyperparameters."""
        stage, capturing = self._stage(0), self._capturing()
        self.captured |= capturing
        if stage.written is not self.pointers:
            stage.upload(self.pointers, captured=capturing)
        return stage

    def step(self, hypers: HyperTable, control: Tensor | None) -> None:
        if control is not None and control.device != self.device:
            control = control.to(self.device)
        with on_device(self.device):
            if self.on_device:
                stage, table = self._pointed(), packed_on_device(hypers.on_device[self.device])
            else:
                stage = self._stage(len(hypers.rows))
                stage.upload(self.pointers, hypers.rows)
                table = stage.hypers
            for (tiles, _), (step, _) in zip(self.tiles, self.launches, strict=True):
                step(tiles, stage.pointers, table, control)
            if not self.captured:
                stage.used()

    def grad_square(self) -> Tensor:
        """The sum of squares of the gradients of the work list, a float64 scalar on the device."""
        partials = [torch.empty(len(tiles), device=self.device) for tiles, _ in self.tiles]
        with on_device(self.device):
            stage = self._pointed() if self.on_device else self._stage(1)
            if not self.on_device:
                stage.upload(self.pointers)
            for (tiles, _), (_, norm), partial in zip(self.tiles, self.launches, partials, strict=True):
                norm(tiles, stage.pointers, partial)
            if not self.captured:
                stage.used()
        return torch.cat(partials).double().sum()
