"""What trains of one parameter, and the layout of its optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..ops import Block, ParamUpdate, decode8, encode8, encode8_stochastically, n_scales
from ..selection import BoundParam, clip, part_here
from ..tensors import Ranges, is_sharded, local_part, placed_like, synced_slice_of

HALVES = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
LOW = ("master_lo", "kahan")
EIGHT = "8bit"
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
SCALE = "_scale"  # `exp_avg_scale` are the scales of 8-bit `exp_avg`


@dataclass(frozen=True)
class Slot:
    """What of one parameter trains, and how its state is kept.

    Attributes:
        part: the parameter and its ranges.
        spans: the ranges, cut further where elements began to train at different steps.
        stream: the parameter's position in the optimizer.
        master: precision of a 16-bit parameter, None for others.
        moment_dtype: of the stored moments, or "8bit".
        dtype: the parameter's when this was decided.
        slice_ranges: ranges of the full weight that the parameter, a sliced leaf, is the
            concatenation of, along `part.dim`; None for other parameters.
    """

    part: BoundParam
    spans: Ranges
    stream: int
    master: str | None
    moment_dtype: torch.dtype | str
    dtype: torch.dtype
    slice_ranges: Ranges | None = None

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def param(self) -> Tensor:
        return self.part.param

    @property
    def within(self) -> Ranges | None:
        """Of a sliced leaf, sharded or not: which ranges of the full weight it holds."""
        return self.part.within or self.slice_ranges

    @cached_property
    def low_key(self) -> str | None:
        """The state entry that holds what 16 bits of the parameter do not."""
        return {"split": "master_lo", "kahan": "kahan"}.get(self.master)

    @property
    def here(self) -> BoundParam:
        """What trains of the shard that this rank holds; `part` where the parameter has no shards."""
        return part_here(self.part)

    def layout(self, amsgrad: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape, of this rank's share, and dtype of every entry of its state but `step`.

        The parameter's shape where all of it trains, else compact.
        """
        shape = tuple(local_part(self.param).shape) if self.part.full else (self.here.numel,)
        if self.moment_dtype == EIGHT:
            n = sum(n_scales(block.of(self.param).numel()) for block in self.blocks)
            entries = {key: (shape, dtype) for key, dtype in CODES.items()}
            entries |= {key + SCALE: ((n,), torch.float32) for key in CODES}
        else:
            entries = {key: (shape, self.moment_dtype) for key in MOMENTS[:3 if amsgrad else 2]}
        if self.low_key:
            entries[self.low_key] = (shape, torch.int16 if self.master == "split" else self.param.dtype)
        return entries

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An entry of `layout` before the first step."""
        return self.placed(torch.zeros(shape, dtype=dtype, device=self.param.device))

    def placed(self, held: Tensor) -> Tensor:
        """This rank's share of a state tensor as it is kept: a DTensor as the parameter is, or compact."""
        return placed_like(self.param, held) if self.part.full else held

    def new_state(self, *, amsgrad: bool, device_step: bool) -> dict[str, Tensor]:
        return {"step": self.step_tensor([0.0], device_step),
                **{key: self.zeros(*entry) for key, entry in self.layout(amsgrad).items()}}

    def step_tensor(self, steps: list[float], on_device: bool) -> Tensor:
        """float32, a scalar as torch keeps it; [n_spans] where spans differ in age."""
        device = self.param.device if on_device else "cpu"
        return torch.tensor(steps[0] if len(steps) == 1 else steps, dtype=torch.float32, device=device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rectangles of the local tensor that train, with their places in the state.

        One for each span, and each of `slice_ranges`. Spans that lie in other ranks' shards are
        empty, so that every rank has as many.
        """
        held, dim = local_part(self.param), self.part.dim
        rows = held.shape[0] if held.ndim else 1
        other = held.numel() // max(rows, 1) if dim == 0 else rows
        at, scale, blocks, spans, index = 0, 0, [], iter(self.spans), -1
        for start, stop in self.part.ranges:
            edge, (first, last) = start, (clip(self.part, start), clip(self.part, stop))
            while edge < stop:
                low, edge = next(spans)
                index += 1
                for piece, after, copy_start in self._pieces(low, edge):
                    top, end = clip(self.part, piece), clip(self.part, after)
                    # the columns of a range lie side by side in its state
                    place = (at + (top - first) * other, other) if dim == 0 else (at + top - first, last - first)
                    blocks.append(Block(dim, top, end, *place, index, copy_start, scale))
                    scale += n_scales((end - top) * other)
            at += (last - first) * other
        return tuple(blocks)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """[start, stop) cut at the ends of `slice_ranges`; each piece, and where it begins in the full weight."""
        if self.slice_ranges is None:
            return [(start, stop, 0)]
        pieces, at = [], 0
        for first, last in self.slice_ranges:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                pieces.append((low, high, first + low - at))
            at += last - first
        return pieces

    def update(self, state: Mapping[str, Tensor], amsgrad: bool, capturable: bool = False) -> ParamUpdate:
        """What the op takes of the parameter in a step."""
        on_device = state["step"].device.type != "cpu" or (capturable and self.param.device.type == "cpu")
        n_rows, synced = state["step"].numel(), None if self.slice_ranges is None else synced_slice_of(self.param)
        weight_copy = synced.weight if synced is not None and synced.writable(self.param) else None
        return ParamUpdate(
            self.name, self.param, self.param.grad,
            None if self.part.full and n_rows == 1 and self.slice_ranges is None else self.blocks,
            state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"] if amsgrad else None,
            state[self.low_key] if self.low_key else None, self.master, self.stream, n_rows=n_rows,
            counts_on_device=on_device, weight_copy=weight_copy,
            scales=(state["exp_avg" + SCALE], state["exp_avg_sq" + SCALE]) if self.moment_dtype == EIGHT else None)

    def decoded(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state with moments as float32 where they are 8-bit codes."""
        if self.moment_dtype != EIGHT:
            return dict(state)
        plain = {key: value for key, value in state.items() if not key.endswith(SCALE)}
        for key in CODES:
            plain[key] = torch.empty_like(state[key], dtype=torch.float32)
            for codes, scales, out in self._coded(state[key], state[key + SCALE], plain[key]):
                out.copy_(decode8(codes, scales))
        return plain

    def encoded(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`decoded` undone, to nearest."""
        if self.moment_dtype != EIGHT:
            return dict(state)
        entries, coded = self.layout(False), dict(state)
        for key, encode in (("exp_avg", encode8), ("exp_avg_sq", lambda x: encode8_stochastically(x, None))):
            coded[key], coded[key + SCALE] = self.zeros(*entries[key]), self.zeros(*entries[key + SCALE])
            for codes, scales, value in self._coded(coded[key], coded[key + SCALE], state[key].float()):
                new = encode(value)
                codes.copy_(new[0])
                scales.copy_(new[1])
        return coded

    def _coded(self, codes: Tensor, scales: Tensor, values: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(codes, scales, values) of every block, views."""
        shapes = [block.of(self.param).shape for block in self.blocks]
        return [(block.of_state(codes, shape), block.of_scales(scales, shape), block.of_state(values, shape))
                for block, shape in zip(self.blocks, shapes, strict=True)]

    def cut(self, dense: Tensor) -> Tensor:
        """This rank's share of a state tensor, from a dense one of the local tensor's shape."""
        return dense.clone(memory_format=torch.contiguous_format) if self.part.full else self.here.cut(dense)

    def spread(self, stored: Tensor) -> Tensor:
        """A state tensor made dense, of the local tensor's shape, zero where nothing trains."""
        if self.part.full:
            return local_part(stored).clone()
        dense = torch.zeros(local_part(self.param).shape, dtype=stored.dtype, device=stored.device)
        self.here.spread(stored, dense)
        return dense

    def describe(self) -> dict[str, Any]:
        """What must agree for a state to be this slot's; plain data, for the state dict."""
        return {"name": self.name, "shape": list(self.param.shape), "dim": self.part.dim,
                "ranges": [list(r) for r in self.part.ranges], "spans": [list(s) for s in self.spans],
                "master": self.master, "moment_dtype": str(self.moment_dtype).removeprefix("torch."),
                # a key of the file format: the name of `within` in files that exist
                **({} if self.within is None else {"mirrored": [list(r) for r in self.within]})}


def check_grad(slot: Slot) -> None:
    """Raises RuntimeError where the gradient is sparse, ValueError where it does not fit."""
    grad, param = slot.param.grad, slot.param
    if param.dtype != slot.dtype:
        raise ValueError(f"{slot.name} is {param.dtype} and was {slot.dtype} when the optimizer was made")
    if slot.part.ranges and slot.part.ranges[-1][1] > slot.part.extent:
        raise ValueError(f"{slot.name} is {list(param.shape)} now: what trains of it reaches to"
                         f" {slot.part.ranges[-1][1]} along dimension {slot.part.dim}; was it resized after the"
                         " optimizer was made?")
    if grad.layout != torch.strided:
        raise RuntimeError(f"HeadAdamW does not support sparse gradients: that of {slot.name} is {grad.layout}")
    if grad.shape != param.shape or grad.device != param.device or not grad.is_floating_point():
        raise ValueError(f"{slot.name}: its gradient is {list(grad.shape)} {grad.dtype} on {grad.device}, expected"
                         f" {list(param.shape)} floating point on {param.device}")
    if is_sharded(param) and (not is_sharded(grad) or grad.placements != param.placements):
        found = f"placed {grad.placements}" if is_sharded(grad) else "no DTensor"
        raise ValueError(f"{slot.name}: its gradient is {found}, expected a DTensor placed as the"
                         f" parameter is, {param.placements}")


def check_state(slot: Slot, state: dict[str, Tensor], amsgrad: bool) -> None:
    """Raises ValueError where an entry is missing or does not fit the parameter."""
    placed = slot.part.full and is_sharded(slot.param)
    for key, (shape, dtype) in slot.layout(amsgrad).items():
        value = state.get(key)
        if value is None:
            raise ValueError(f"{slot.name}: its state has no {key}; was amsgrad or master switched on after a step?")
        if is_sharded(value) != placed:
            raise ValueError(f"{slot.name}: its {key} is {'a' if is_sharded(value) else 'no'} DTensor, expected"
                             f" {'one' if placed else 'none'}; was the model sharded after the first step?")
        value = local_part(value)
        if tuple(value.shape) != shape or value.device != slot.param.device or value.dtype != dtype \
                or not value.is_contiguous():
            raise ValueError(f"{slot.name}: its {key} is {list(value.shape)} {value.dtype} on {value.device}, expected"
                             f" {list(shape)} {dtype} on {slot.param.device}, contiguous; was the model moved after"
                             " the first step, or the state replaced?")
