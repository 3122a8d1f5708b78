"""The optimizer's state of one parameter: what trains of it, the shape of its state, and what fits it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Block, decode8, encode8, encode8_stochastically, n_scales
from ..selection import BoundParam, check_shards, clip, part_here
from ..tensors import Ranges, is_sharded, like, local, synced_slice_of

MASTERS = (None, "split", "kahan", "stochastic")
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
        mirrored: ranges of the full weight that the parameter, a sliced leaf, is the
            concatenation of, along `part.dim`; None for other parameters.
    """

    part: BoundParam
    spans: Ranges
    stream: int
    master: str | None
    moment_dtype: torch.dtype | str
    dtype: torch.dtype
    mirrored: Ranges | None = None

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def param(self) -> Tensor:
        return self.part.param

    @property
    def within(self) -> Ranges | None:
        """Of a sliced leaf, sharded or not: which ranges of the full weight it holds."""
        return self.part.within or self.mirrored

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
        shape = tuple(local(self.param).shape) if self.part.full else (self.here.numel,)
        if self.moment_dtype == EIGHT:
            n = sum(n_scales(block, self.param) for block in self.blocks)
            entries = {key: (shape, dtype) for key, dtype in CODES.items()}
            entries |= {key + SCALE: ((n,), torch.float32) for key in CODES}
        else:
            entries = {key: (shape, self.moment_dtype) for key in MOMENTS[:3 if amsgrad else 2]}
        if self.low_key:
            entries[self.low_key] = (shape, self.low_dtype)
        return entries

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An entry of `layout` before the first step."""
        return self.placed(torch.zeros(shape, dtype=dtype, device=self.param.device))

    def placed(self, held: Tensor) -> Tensor:
        """This rank's share of a state tensor as the tensor that is kept: a DTensor as the parameter is, or compact."""
        return like(self.param, held) if self.part.full else held

    def new_state(self, *, amsgrad: bool, device_step: bool) -> dict[str, Tensor]:
        return {"step": self.step_tensor([0.0], device_step),
                **{key: self.zeros(*entry) for key, entry in self.layout(amsgrad).items()}}

    @property
    def low_dtype(self) -> torch.dtype:
        return torch.int16 if self.master == "split" else self.param.dtype

    def step_tensor(self, steps: list[float], on_device: bool) -> Tensor:
        """float32, a scalar as torch keeps it; [n_spans] where spans differ in age."""
        device = self.param.device if on_device else "cpu"
        return torch.tensor(steps[0] if len(steps) == 1 else steps, dtype=torch.float32, device=device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rectangles of the local tensor that train, with their places in the state.

        One for each span, and each mirrored range. Spans that lie in other ranks' shards are
        empty, so that every rank has as many.
        """
        held = local(self.param)
        rows = held.shape[0] if held.ndim else 1
        other = held.numel() // max(rows, 1) if self.part.dim == 0 else rows
        at, blocks, spans, index = 0, [], iter(self.spans), -1
        for start, stop in self.part.ranges:
            edge, (first, last) = start, (clip(self.part, start), clip(self.part, stop))
            while edge < stop:
                low, edge = next(spans)
                index += 1
                for piece, after, mirror in self._mirrored(low, edge):
                    top, end = clip(self.part, piece), clip(self.part, after)
                    if self.part.dim == 0:
                        blocks.append(Block(0, top, end, at + (top - first) * other, other, index, mirror))
                    else:  # the columns of a range lie side by side in its state
                        blocks.append(Block(1, top, end, at + top - first, last - first, index, mirror))
            at += (last - first) * other
        return tuple(blocks)

    def _mirrored(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """[start, stop) cut where it leaves a mirrored range; each piece, and where it begins in the mirror."""
        if self.mirrored is None:
            return [(start, stop, 0)]
        pieces, at = [], 0
        for first, last in self.mirrored:
            low, high = max(start, at), min(stop, at + last - first)
            if low < high:
                pieces.append((low, high, first + low - at))
            at += last - first
        return pieces

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
        parts = scales.split([n_scales(block, self.param) for block in self.blocks])
        shapes = [block.of(self.param).shape for block in self.blocks]
        return [(block.of_state(codes, shape), part, block.of_state(values, shape))
                for block, shape, part in zip(self.blocks, shapes, parts, strict=True)]

    def cut(self, dense: Tensor) -> Tensor:
        """This rank's share of a state tensor, from a dense one of the local tensor's shape."""
        return dense.clone(memory_format=torch.contiguous_format) if self.part.full else self.here.cut(dense)

    def spread(self, stored: Tensor) -> Tensor:
        """A state tensor made dense, of the local tensor's shape, zero where nothing trains."""
        if self.part.full:
            return local(stored).clone()
        dense = torch.zeros(local(self.param).shape, dtype=stored.dtype, device=stored.device)
        self.here.spread(stored, dense)
        return dense

    def describe(self) -> dict[str, Any]:
        """What must agree for a state to be this slot's; plain data, for the state dict."""
        return {"name": self.name, "shape": list(self.param.shape), "dim": self.part.dim,
                "ranges": [list(r) for r in self.part.ranges], "spans": [list(s) for s in self.spans],
                "master": self.master, "moment_dtype": str(self.moment_dtype).removeprefix("torch."),
                **({} if self.within is None else {"mirrored": [list(r) for r in self.within]})}


def regrown(old: Slot, new: Slot, state: Mapping[str, Tensor]) -> tuple[Slot, dict[str, Tensor]]:
    """The state of `old` carried to another selection of the same parameter.

    Elements in both keep everything (8-bit moments are coded anew, to nearest, where the 64 that
    share a scale change); elements that join start with empty moments and a step count of their
    own, so that their bias correction is that of a fresh AdamW.

    Raises:
        ValueError: the parameter was cut along the other axis.
    """
    if old.part.dim != new.part.dim and not (old.part.full and len(old.spans) == 1):
        raise ValueError(f"{old.name} was cut along dimension {old.part.dim} and is now cut along {new.part.dim}")
    steps = state["step"].reshape(-1).tolist()
    age = [0.0] * new.part.extent
    if old.part.dim != new.part.dim:
        age = steps * new.part.extent
    else:
        for index, (start, stop) in enumerate(old.spans):
            age[start:stop] = [steps[index % len(steps)]] * (stop - start)
    spans, ages = [], []
    for start, stop in new.part.ranges:
        edges = [start, *(i for i in range(start + 1, stop) if age[i] != age[i - 1]), stop]
        spans += list(zip(edges[:-1], edges[1:], strict=True))
        ages += [age[edge] for edge in edges[:-1]]
    if len(set(ages)) == 1:
        spans, ages = list(new.part.ranges), ages[:1]
    slot = replace(new, spans=tuple(spans))
    step = slot.step_tensor(ages, state["step"].device.type != "cpu")
    if slot.blocks == old.blocks:
        return slot, {**state, "step": step}
    carried = {key: new.placed(new.cut(old.spread(value)))
               for key, value in old.decoded(state).items() if key != "step"}
    return slot, {"step": step, **slot.encoded(carried)}


def checked_precision(name: str, group: Mapping[str, Any]) -> None:
    """Raises ValueError where a group's `master` or `moment_dtype` is none that exists."""
    if group["master"] not in MASTERS:
        raise ValueError(f"{name}: master is {group['master']!r}; expected one of {MASTERS}")
    if group["moment_dtype"] not in (torch.float32, torch.bfloat16, EIGHT):
        raise ValueError(f"{name}: moment_dtype is {group['moment_dtype']!r}; expected torch.float32, torch.bfloat16 or"
                         f" {EIGHT!r}")
    if group["moment_dtype"] == EIGHT and group["amsgrad"]:
        raise ValueError(f"{name}: amsgrad has no 8-bit form; take moment_dtype=torch.bfloat16, or amsgrad=False")


def whole(name: str, param: Tensor) -> BoundParam:
    """All of a parameter."""
    return BoundParam(name, param, 0, ((0, param.shape[0] if param.ndim else 1),))


def slot_of(part: BoundParam, stream: int, group: Mapping[str, Any]) -> Slot:
    """How what trains of a parameter is kept under a group's options.

    The state of a sliced leaf lies as that of the full weight's selection would: with several
    ranges of columns it is compact, range after range.
    """
    param, mirrored = part.param, None
    if group["moment_dtype"] == EIGHT and is_sharded(param):
        raise ValueError(f"{part.name} is a DTensor: 8-bit moments of sharded parameters are not implemented; take"
                         " moment_dtype=torch.bfloat16 or torch.float32")
    if part.full and (mirror := synced_slice_of(param)) is not None:
        mirrored = mirror.ranges
        edges = [0, *accumulate(stop - start for start, stop in mirrored)]
        apart = mirror.dim == 1 and len(mirrored) > 1
        part = BoundParam(part.name, param, mirror.dim,
                          tuple(zip(edges[:-1], edges[1:], strict=True)) if apart else ((0, edges[-1]),))
    return Slot(part, part.ranges, stream, group["master"] if param.dtype in HALVES else None,
                torch.float64 if param.dtype == torch.float64 else group["moment_dtype"], param.dtype, mirrored)


def check_param(part: BoundParam) -> None:
    """Raises ValueError where the parameter is of a sort that does not train here."""
    if part.param.dtype not in (torch.float64, torch.float32, *HALVES):
        raise ValueError(f"{part.name} has dtype {part.param.dtype}; HeadAdamW trains real floating-point parameters of 16 "
                         "bits or more")
    if part.param.layout != torch.strided:
        raise ValueError(f"{part.name} has layout {part.param.layout}; HeadAdamW trains dense parameters")
    if any(stride == 0 and size > 1 for stride, size in zip(part.param.stride(), part.param.shape, strict=True)):
        raise ValueError(f"{part.name} is expanded: several of its elements are one place in memory; clone it first")
    check_shards(part)


def check_overlaps(named: Iterable[tuple[str, Tensor]], trained: Iterable[Tensor]) -> None:
    """Raises ValueError where a parameter that trains shares memory with another one, which would move with it."""
    spans = sorted((param.data_ptr(), param.data_ptr() + param.nbytes, name, id(param)) for name, param in named
                   if type(param) in (Tensor, nn.Parameter) and param.is_contiguous() and param.numel() and not param.is_meta)
    moving = {id(param) for param in trained}
    for (_, stop, name, one), (start, _, other, two) in pairwise(spans):
        if start < stop and one != two and (one in moving or two in moving):
            raise ValueError(f"{name} and {other} share memory and are two parameters: the one would move with the other; "
                             "make them one parameter, or clone one of them")


def check_grad(slot: Slot) -> None:
    """Raises RuntimeError where the gradient is sparse, ValueError where it does not fit."""
    grad, param = slot.param.grad, slot.param
    if param.dtype != slot.dtype:
        raise ValueError(f"{slot.name} is {param.dtype} and was {slot.dtype} when the optimizer was made")
    if slot.part.ranges and slot.part.ranges[-1][1] > slot.part.extent:
        raise ValueError(f"{slot.name} is {list(param.shape)} now: what trains of it reaches to {slot.part.ranges[-1][1]} along "
                         f"dimension {slot.part.dim}; was it resized after the optimizer was made?")
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
        value = local(value)
        if tuple(value.shape) != shape or value.device != slot.param.device or value.dtype != dtype \
                or not value.is_contiguous():
            raise ValueError(f"{slot.name}: its {key} is {list(value.shape)} {value.dtype} on {value.device}, expected"
                             f" {list(shape)} {dtype} on {slot.param.device}, contiguous; was the model moved after"
                             " the first step, or the state replaced?")
