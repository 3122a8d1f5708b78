"""The tables of one launch of the AdamW kernel, and which of them are on the device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..device import capturing, current_stream, device_code, keep_for_current_stream, on_device, triton_type
from .launch import KernelLaunch, Stage
from .param_update import GradControl, HyperRow, HyperTable, ParamUpdate
from .tables import TILE, VECTOR, WIDE, Pointers, aligned, at_16, padded, tiles_of, with_grads

# Tiles of a program: of the step and of the norm, which reads 2 KB of each. Two tiles of a step would overlap, but take
# twice the registers, so that half as many programs run at once: the memory is asked for as much either way.
TILES, NORM_TILES = 1, 8
RING = 4  # steps whose tables may be on their way at once
SPARES = 4  # captures of a step between two that are not captured
WARPS = {True: 4, False: 8}  # of the aligned and the unaligned variant: an address for each element takes registers
WARPS_8BIT = 2  # of aligned steps with 8-bit moments: 16 elements of a thread share what its scales cost
# Of a thread of an aligned step, at most: else ptxas spills some bytes of some variants to fit one more program.
REGISTERS, REGISTERS_8BIT = 96, 168
NO_STEP_BEFORE = "HeadAdamW.step is captured in a CUDA graph and never ran outside of a capture"
STEP_FIRST = "take one step that is not captured first, as torch asks for every optimizer"


class Part(NamedTuple):
    """The tiles of one launch, those that may be read 16 bytes at a time or the others, and its kernels."""

    tiles: Tensor
    step: KernelLaunch
    norm: KernelLaunch


class Plan:
    """The tables of one launch.

    The work list is built once. Addresses, and hyperparameters where the host counts steps, go to the
    device together, through a ring of pinned buffers, so that no step waits for another. Where the
    device counts steps, addresses go there when one changed, and the hyperparameters are there.

    A CUDA graph copies from pinned memory whenever it is replayed: the stage that a capture was given is its
    own from then on.
    """

    def __init__(self, updates: list[ParamUpdate], layout: list[tuple], pointers: list[Pointers]) -> None:
        first = updates[0]
        if capturing(first.param.device):
            raise RuntimeError(f"{NO_STEP_BEFORE} with parameters and gradients like these: {STEP_FIRST}")
        self.layout, self.device, self.on_device = layout, first.param.device, first.counts_on_device
        self.pointers = array("q", chain.from_iterable(pointers))
        self.n_params = len(updates)
        self.members: list[int] = []  # places of these parameters among all of a step
        self.written: list[Tensor] = []
        tiles = [tiles_of(update, index) for index, update in enumerate(updates)]
        self.fits = [aligned(rows, row) for rows, row in zip(tiles, pointers, strict=True)]
        copied, self.parts = any(u.weight_copy is not None for u in updates), []
        for hint in (True, False):
            rows = [t for t, fit in zip(tiles, self.fits, strict=True) if fit == hint]
            if sum(map(len, rows)):
                self.parts.append(_part(first, torch.cat(rows), hint, copied))
        self.n_norms = sum(part.norm.n for part in self.parts)
        self.home = current_stream(self.device)
        self.ring: list[Stage] = []
        self.spares: list[Stage] = []  # for captures
        self.captured: list[Stage] = []  # graphs read them for as long as they live
        self.turn = 0
        self.stage: Stage | None = None  # of the current step
        self.hypers: Tensor | None = None
        self.loaded: HyperTable | None = None  # the hyperparameters of which `stage` and `hypers` are

    def point(self, pointers: list[Pointers]) -> bool:
        """Take these addresses; False where this plan cannot."""
        flat = array("q", chain.from_iterable(pointers))
        if flat != self.pointers:
            wide = (array("q", [row[i] for i in WIDE]) for fit, row in zip(self.fits, pointers, strict=True) if fit)
            if not all(map(at_16, wide)):
                return False
            self.pointers = flat
        return True

    def move(self, grads: Sequence[int]) -> bool:
        """Take these addresses of the gradients; False where this plan cannot."""
        moved = array("q", grads)
        if not at_16(moved) and any([fit and grad & 15 for fit, grad in zip(self.fits, grads, strict=True)]):
            return False
        self.pointers = with_grads(self.pointers, moved)
        return True

    def upload(self, hypers: HyperTable | None = None) -> None:
        """Make the addresses and the hyperparameters of this step current on the device, once for all its kernels.

        Raises:
            RuntimeError: the step is captured, and did not run outside of a capture before.
        """
        if hypers is not None and self.loaded is hypers:
            return
        if capturing(self.device):
            self.stage = self._spare()
            self.stage.capture(self.pointers)
        else:
            self._upload(() if hypers is None or self.on_device else hypers.rows, current_stream(self.device))
        self.hypers, self.loaded = self.stage.hypers, hypers
        if self.on_device and hypers is not None:
            self.hypers = hypers.on_device[self.device].float()

    def _upload(self, rows: Sequence[HyperRow], stream: int) -> None:
        if stream != self.home:
            for part in self.parts:
                keep_for_current_stream(part.tiles)
        if self.on_device:
            while len(self.spares) < SPARES:  # a capture cannot make pinned memory
                self.spares.append(Stage(self.n_params, 0, self.device))
            if self.ring and self.ring[self.turn].written is self.pointers:
                self.stage = self.ring[self.turn]
                self.stage.used_on(stream)
                return
        if not self.ring or self.ring[0].capacity < len(rows):
            self.ring = [Stage(self.n_params, 2 * len(rows), self.device) for _ in range(RING)]
        self.turn = (self.turn + 1) % RING
        self.stage = self.ring[self.turn]
        self.stage.upload(self.pointers, rows, stream)

    def _spare(self) -> Stage:
        if not self.spares:
            raise RuntimeError(f"HeadAdamW.step was captured in a CUDA graph {SPARES} times since it last ran outside"
                               f" of a capture: {STEP_FIRST}")
        self.captured.append(self.spares.pop())
        return self.captured[-1]

    def step(self, hypers: HyperTable, control: GradControl) -> None:
        with on_device(self.device):
            self.upload(hypers)
            numbers = control.on(self.device)
            for part in self.parts:
                part.step(part.tiles, self.stage.pointers, self.hypers, *numbers)
            self.stage.launched()
        self.loaded = None
        increment_version(self.written)

    def grad_squares(self, hypers: HyperTable | None, grad_scale: Tensor | None, out: Tensor) -> None:
        """Sums of squares of the unscaled gradients of the work list, one for each program.

        Args:
            out: float64 [n_norms], on the device.
        """
        with on_device(self.device):
            self.upload(hypers)
            for part in self.parts:
                here, out = (out, None) if part is self.parts[-1] else (out[:part.norm.n], out[part.norm.n:])
                part.norm(part.tiles, self.stage.pointers, GradControl(grad_scale).on(self.device)[1], here)
            self.stage.launched()


def _part(first: ParamUpdate, tiles: Tensor, hint: bool, copied: bool) -> Part:
    """The launches over these tiles of parameters like the first."""
    code, grad = device_code("head_adamw"), {"GRAD": triton_type(first.grad.dtype)}
    kind = {"PARAM": triton_type(first.param.dtype), **grad, "MOMENT": triton_type(first.exp_avg.dtype),
            "MASTER": first.master, "AMSGRAD": first.max_exp_avg_sq is not None, "WEIGHT_COPY": copied}
    shape = {"ALIGNED": hint, "GROUPS": TILE // VECTOR}
    rows = padded(tiles, TILES, 2 * NORM_TILES)  # an even number of sums: those of the next part begin at 16 bytes
    return Part(rows.to(first.param.device),
                KernelLaunch(code.head_adamw_kernel, -(-len(tiles) // TILES), {**kind, **shape, "TILES": TILES},
                             _options(first, hint)),
                KernelLaunch(code.head_grad_norm_kernel, len(rows) // NORM_TILES,
                             {**grad, **shape, "TILES": NORM_TILES}, {"num_warps": WARPS[hint]}))


def _options(update: ParamUpdate, hint: bool) -> dict[str, int]:
    """Of the compiler, for a step of such parameters."""
    eight = update.scales is not None
    options = {"num_warps": WARPS_8BIT if hint and eight and update.param.dtype == torch.bfloat16 else WARPS[hint]}
    if hint and torch.version.hip is None:  # an option of NVIDIA's compiler alone
        options["maxnreg"] = REGISTERS_8BIT if eight else REGISTERS
    return options
