"""One AdamW step on the selected slices of many weights: checks, tables, grid and launch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from operator import is_

import torch
from torch import Tensor

from . import device_code, reference
from .adamw_tables import COLS, ROWS, aligned, numbers, pointers_of, tiles_of
from .updates import Hyper, Update

RING = 4  # steps whose numbers may be on their way at once

Plans = dict[tuple, "Plan"]


def head_adamw_(updates: Sequence[Update], *, control: Tensor | None = None, seed: int = 0,
                plans: Plans | None = None, backend: str | None = None) -> None:
    """One AdamW step, in place; `reference.head_adamw_` says what that is. Advances each state's `step`.

    All tables are made before the first launch. One launch for every (device, param, grad, state) dtype tuple; tensors that the kernel
    cannot address (float64, rows that are not contiguous) go to the reference.

    Args:
        updates: parameters of any dtypes, on any devices, whose shapes fit.
        control: [2] float32: what gradients are multiplied by, and whether (not zero) nothing
            may move.
        seed: of stochastic rounding, below 2^64.
        plans: where the tables of earlier steps are kept for the next; empty at first.
        backend: "triton" to run the kernel whatever the device (in Triton's interpreter),
            "reference" never to; default: the kernel on CUDA.
    """
    plain, grouped = _sorted(updates, backend)
    launches = [(_plan(plans, key, group, seed), group) for key, group in grouped.items() if key is not None]
    if plain:
        reference.head_adamw_(plain, control=control, seed=seed)
    for plan, group in launches:
        plan.step(group, None if control is None else control.to(plan.device))
        _advance(group, control)
    _advance(grouped.get(None, []), control)


def _advance(updates: list[Update], control: Tensor | None) -> None:
    steps = [update.state["step"] for update in updates if update.state is not None]
    if steps:  # of counts on the host the caller has seen to it that this step is taken
        skips = control is not None and steps[0].is_cuda
        torch._foreach_add_(steps, (control[1] == 0).to(steps[0]) if skips else 1)


def head_grad_norm(updates: Sequence[Update], *, seed: int = 0, plans: Plans | None = None,
                   backend: str | None = None) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone, a float64 scalar.

    Deterministic: partial sums of tiles in float32, added up in float64 in a fixed order.
    """
    plain, grouped = _sorted(updates, backend)
    squares = [reference.head_grad_norm(plain).square()] if plain or not grouped.keys() - {None} else []
    squares += [_plan(plans, key, group, seed).grad_square() for key, group in grouped.items() if key is not None]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _sorted(updates: Sequence[Update], backend: str | None) -> tuple[list[Update], dict[tuple, list[Update]]]:
    """Those for the reference, and those for the kernel by launch; under None what has no element."""
    if backend not in (None, "triton", "reference"):
        raise ValueError(f"backend is {backend!r}; expected 'triton', 'reference' or None")
    plain, grouped = [], defaultdict(list)
    for update in updates:
        if backend == "reference" or (backend is None and not update.param.is_cuda) or not update.launchable:
            plain.append(update)
        else:
            key = (update.launch, isinstance(update.hypers, Tensor)) if update.exp_avg.numel() else None
            grouped[key].append(update)
    return plain, grouped


def _plan(plans: Plans | None, key: tuple, updates: list[Update], seed: int) -> Plan:
    """The tables of this launch, those of an earlier step where they still hold."""
    known = plans.get(key) if plans is not None else None
    if known is not None and known.is_of(updates, seed):
        return known
    layout = [(u.param.shape, u.param.stride(), u.grad.stride(), u.blocks, u.n_hypers) for u in updates]
    pointers = [pointers_of(u, seed) for u in updates]
    if known is not None and known.layout == layout and known.point(pointers):
        known.updates = updates
        return known
    made = Plan(updates, layout, pointers, seed)
    if plans is not None:
        if known is not None and known.captured:
            plans[key, id(known)] = known  # a CUDA graph still reads its tables
        plans[key] = made
    return made


class Plan:
    """The tables of one launch, on the device.

    The work list is built once; the pointer table is written again when an address changed;
    the numbers go through a ring of pinned buffers, so that no step waits for another.
    """

    def __init__(self, updates: list[Update], layout: list[tuple], pointers: list[tuple[int, ...]],
                 seed: int) -> None:
        self.layout, self.device, self.grad_dtype = layout, updates[0].param.device, updates[0].grad.dtype
        self.updates, self.seed = updates, seed
        first, hinted, unhinted = 0, [], []
        self.fits: list[bool] = []
        for index, update in enumerate(updates):
            tiles = tiles_of(update, index, first)
            self.fits.append(aligned(tiles, pointers[index]))
            (hinted if self.fits[-1] else unhinted).append(tiles)
            first += update.n_hypers
        # Tensors that cannot be read 16 bytes at a time, if there are any, take a launch of their own.
        self.tiles = [(torch.cat(tiles).to(self.device), hint) for tiles, hint in ((hinted, True), (unhinted, False))
                      if tiles]
        self.pointers: list[tuple[int, ...]] = pointers
        self.table = torch.tensor(pointers, dtype=torch.int64).to(self.device)
        self.captured = False
        self.pinned = torch.empty_like(self.table, device="cpu", pin_memory=self.device.type == "cuda")
        depth = RING if self.device.type == "cuda" else 0
        self.ring = [Stage((first, len(Hyper._fields)), self.device) for _ in range(depth)]
        self.turn = 0

    def is_of(self, updates: list[Update], seed: int) -> bool:
        """These very updates were the last ones: nothing but their numbers can have changed."""
        same = seed == self.seed and len(updates) == len(self.updates) and all(map(is_, updates, self.updates))
        self.captured |= same and self._capturing()
        return same

    def point(self, pointers: list[tuple[int, ...]]) -> bool:
        """Write the addresses again where one changed; False where this plan cannot take them."""
        if pointers == self.pointers:
            self.captured |= self._capturing()
            return True
        still = (not fit or not any(p % 16 for p in row[:6]) for fit, row in zip(self.fits, pointers, strict=True))
        if self.captured or not all(still):
            return False
        self.pointers = pointers
        if self._capturing():  # the graph copies from pinned memory, which then stays as it is
            self.captured = True
            self.pinned.copy_(torch.tensor(pointers, dtype=torch.int64))
            self.table.copy_(self.pinned, non_blocking=True)
        else:  # a new table: kernels in flight may still read the old one
            self.table = torch.tensor(pointers, dtype=torch.int64).to(self.device)
        return True

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def step(self, updates: list[Update], control: Tensor | None) -> None:
        first = updates[0]
        table, stage = numbers([u.hypers for u in updates]), None
        if table.device != self.device:
            stage = self.ring[self.turn]
            self.turn = (self.turn + 1) % len(self.ring)
            table = stage.upload(table)
        kernel = device_code("head_adamw").head_adamw_kernel
        with _on(self.device):
            for tiles, hint in self.tiles:
                kernel[(len(tiles),)](
                    tiles, self.table, table, control,
                    PARAM=_triton_type(first.param.dtype), GRAD=_triton_type(first.grad.dtype),
                    MOMENT=_triton_type(first.exp_avg.dtype), MASTER=first.master,
                    AMSGRAD=first.max_exp_avg_sq is not None, ALIGNED=hint, ROWS=ROWS, COLS=COLS,
                    num_warps=4, enable_fp_fusion=False)
            if stage is not None:
                stage.done.record()

    def grad_square(self) -> Tensor:
        """The sum of squares of the gradients of the work list, a float64 scalar on the device."""
        kernel = device_code("head_adamw").head_grad_norm_kernel
        partial = torch.empty(sum(len(tiles) for tiles, _ in self.tiles), device=self.device)
        at = 0
        with _on(self.device):
            for tiles, hint in self.tiles:
                kernel[(len(tiles),)](tiles, self.table, partial[at:at + len(tiles)], GRAD=_triton_type(self.grad_dtype),
                                      ALIGNED=hint, ROWS=ROWS, COLS=COLS, num_warps=4, enable_fp_fusion=False)
                at += len(tiles)
        return partial.double().sum()


class Stage:
    """Pinned memory and its place on the device, for one step's numbers.

    Neither is written again before the kernel that read it last is through: the host waits for
    the event before it writes the pinned memory, the stream before it copies.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.pinned = torch.empty(shape, pin_memory=True)
        self.there = torch.empty(shape, device=device)
        self.done = torch.cuda.Event()

    def upload(self, numbers: Tensor) -> Tensor:
        self.done.synchronize()
        self.pinned.copy_(numbers)
        with torch.cuda.device(self.there.device):
            self.done.wait()
            return self.there.copy_(self.pinned, non_blocking=True)


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _triton_type(dtype: torch.dtype):
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
