"""One AdamW step on the selected slices of many weights: checks, and which update goes into which launch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..device import on_device, runs_kernels
from . import cpu
from .param_update import GradControl, HyperTable, ParamUpdate, counted
from .plan import Plan
from .tables import pointers_of


def head_adamw_(updates: Sequence[ParamUpdate], hypers: HyperTable, *, control: GradControl = GradControl(),
                seed: int = 0, launches: Launches | None = None, backend: str | None = None) -> None:
    """One AdamW step, in place; `oracle.head_adamw_` says what that is.

    All tables are made before the first launch. One launch for every (device, param, grad,
    state) dtype tuple; tensors that the kernel cannot address (float64, rows that are not
    contiguous) go to the CPU backend, which advances `ParamUpdate.step` of its parameters. Those of
    the kernel are for the caller to advance, unless a later launch fails. Version counters of the
    weights advance, as after any operation in place; those of the state, which no graph of autograd
    holds, do not.

    Args:
        updates: parameters of any dtypes, on any devices, whose shapes fit.
        hypers: of this step.
        control: how gradients are unscaled and clipped, and whether anything may move.
        seed: of stochastic rounding, below 2^64.
        launches: where the tables of earlier steps are kept for the next; the same list of
            updates then means that nothing but hyperparameters changed since.
        backend: "triton" to run the kernel whatever the device (in Triton's interpreter),
            "torch" never to; default: the kernel on CUDA.

    Raises:
        RuntimeError: a CUDA graph is captured, and no step was taken before.
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
                torch._foreach_add_(steps, counted(control.found_inf, steps[0]))
            raise


def head_grad_norm(updates: Sequence[ParamUpdate], hypers: HyperTable | None = None, *,
                   grad_scale: Tensor | None = None, seed: int = 0, launches: Launches | None = None,
                   backend: str | None = None) -> Tensor:
    """The l2 norm of the unscaled gradients over the selected blocks alone, a float64 scalar.

    Deterministic: sums of squares of some tiles in float32, added up in float64 in a fixed order.

    Args:
        hypers: of the step that follows with the same `launches`, which then finds its tables on the device.
        grad_scale: what the gradients are divided by; None: by 1.
    """
    launches = launches if launches is not None else Launches()
    plans = launches.of(updates, seed, backend)
    by_device, squares = defaultdict(list), []
    for plan in plans:
        by_device[plan.device].append(plan)
    for device, members in by_device.items():
        sums, at = torch.empty(sum([plan.n_norms for plan in members]), dtype=torch.float64, device=device), 0
        for plan in members:
            plan.grad_squares(hypers, grad_scale, sums if len(members) == 1 else sums[at:at + plan.n_norms])
            at += plan.n_norms
        squares.append(sums.sum())
    if launches.plain or not plans:
        squares.append((cpu.head_grad_norm(launches.plain) * GradControl(grad_scale).factor()).square())
    if len(squares) > 1:
        squares = [torch.stack([square.to(squares[0].device) for square in squares]).sum()]
    return squares[0].sqrt()


class Launches:
    """Which update goes into which launch, and the tables of each launch, kept from step to step."""

    def __init__(self) -> None:
        self.plain: list[ParamUpdate] = []  # those of the CPU backend
        self.current: list[Plan] = []
        self._plans: dict[tuple, Plan] = {}
        self._captured: list[Plan] = []  # CUDA graphs read their tables for as long as they live
        self._known: tuple = (None, None, None)

    def outdated(self, seed: int, backend: str | None) -> bool:
        """A step will look at the gradients themselves, not at addresses that are known."""
        return bool(self.plain) or self._known[0] is None or self._known[1:] != (seed, backend)

    def for_others(self) -> Launches:
        """Empty, for other updates; what a CUDA graph may still read stays."""
        fresh = Launches()
        fresh._captured = self._captured + [plan for plan in self._plans.values() if plan.captured]
        return fresh

    def moved(self, grads: Sequence[int] = ()) -> None:
        """The updates changed; `grads`: in nothing but the addresses of their gradients, which are these."""
        if not grads or self._known[0] is None or not all([
                plan.move(grads if len(grads) == len(plan.members) else [grads[i] for i in plan.members])
                for plan in self.current]):
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
            if backend == "torch" or (backend is None and not runs_kernels(update.param)) or not update.launchable:
                plain.append(update)
            elif update.exp_avg.numel():
                grouped[update.launch_key].append(index)
        self.current = [self.plan(key, [updates[i] for i in members], seed) for key, members in grouped.items()]
        for plan, members in zip(self.current, grouped.values(), strict=True):
            plan.members = members
            plan.written = [t for i in members for t in (updates[i].param, updates[i].weight_copy) if t is not None]
        for plan in self._plans.values():
            if not any([plan is other for other in self.current]):
                plan.written = []
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
        with on_device(updates[0].param.device):
            made = self._plans[key] = Plan(updates, layout, pointers)
        return made
