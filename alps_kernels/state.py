"""The optimizer's state of one parameter: what trains of it, the shape of its state, and what fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .binding import BoundParam, Ranges
from .ops.updates import Block
from .placement import is_sharded, like, local
from .sharding import check_shards, clip, part_here

MASTERS = (None, "split", "kahan", "stochastic")
HALVES = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
LOW = ("master_lo", "kahan")


@dataclass(frozen=True)
class Slot:
    """What of one parameter trains, and how its state is kept.

    Attributes:
        part: the parameter and its ranges.
        spans: the ranges, cut further where elements began to train at different steps.
        stream: the parameter's position in the optimizer.
        master: precision of a 16-bit parameter, None for others.
        moment_dtype: of the stored moments.
        dtype: the parameter's when this was decided.
    """

    part: BoundParam
    spans: Ranges
    stream: int
    master: str | None
    moment_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def param(self) -> Tensor:
        return self.part.param

    @cached_property
    def low_key(self) -> str | None:
        """The state entry that holds what 16 bits of the parameter do not."""
        return {"split": "master_lo", "kahan": "kahan"}.get(self.master)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """State before the first step: the parameter's shape where all of it trains, else compact."""
        return self.placed(torch.zeros(self.shape_here, dtype=dtype, device=self.param.device))

    @property
    def here(self) -> BoundParam:
        """What trains of the shard that this rank holds; `part` where the parameter has no shards."""
        return part_here(self.part)

    @property
    def shape_here(self) -> tuple[int, ...]:
        """Of this rank's share of a state tensor."""
        return tuple(local(self.param).shape) if self.part.full else (self.here.numel,)

    def placed(self, held: Tensor) -> Tensor:
        """This rank's share of a state tensor as the tensor that is kept: a DTensor as the parameter is, or compact."""
        return like(self.param, held) if self.part.full else held

    def new_state(self, *, amsgrad: bool, device_step: bool) -> dict[str, Tensor]:
        state = {"step": self.step_tensor([0.0], device_step)}
        for key in MOMENTS[:3 if amsgrad else 2]:
            state[key] = self.zeros(self.moment_dtype)
        if self.low_key:
            state[self.low_key] = self.zeros(self.low_dtype)
        return state

    @property
    def low_dtype(self) -> torch.dtype:
        return torch.int16 if self.master == "split" else self.param.dtype

    def step_tensor(self, steps: list[float], on_device: bool) -> Tensor:
        """float32, a scalar as torch keeps it; [n_spans] where spans differ in age."""
        device = self.param.device if on_device else "cpu"
        return torch.tensor(steps[0] if len(steps) == 1 else steps, dtype=torch.float32, device=device)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The rectangles of the local tensor that train, with their places in the state: one for each span.

        Spans that lie in other ranks' shards are empty, so that every rank has as many.
        """
        held = local(self.param)
        rows = held.shape[0] if held.ndim else 1
        other = held.numel() // max(rows, 1) if self.part.dim == 0 else rows
        at, blocks, spans = 0, [], iter(self.spans)
        for start, stop in self.part.ranges:
            edge, (first, last) = start, (clip(self.part, start), clip(self.part, stop))
            while edge < stop:
                low, edge = next(spans)
                top, end = clip(self.part, low), clip(self.part, edge)
                if self.part.dim == 0:
                    blocks.append(Block(0, top, end, at + (top - first) * other, other))
                else:  # the columns of a range lie side by side in its state
                    blocks.append(Block(1, top, end, at + top - first, last - first))
            at += (last - first) * other
        return tuple(blocks)

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
                "master": self.master, "moment_dtype": str(self.moment_dtype).removeprefix("torch.")}


def regrown(old: Slot, new: Slot, state: Mapping[str, Tensor]) -> tuple[Slot, dict[str, Tensor]]:
    """The state of `old` carried to another selection of the same parameter.

    Elements in both keep everything; elements that join start with empty moments and a step
    count of their own, so that their bias correction is that of a fresh AdamW.

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
    carried = {key: new.placed(new.cut(old.spread(value))) for key, value in state.items() if key != "step"}
    return slot, {"step": slot.step_tensor(ages, state["step"].device.type != "cpu"), **carried}


def checked_precision(name: str, group: Mapping[str, Any]) -> None:
    """Raises ValueError where a group's `master` or `moment_dtype` is none that exists."""
    if group["master"] not in MASTERS:
        raise ValueError(f"{name}: master is {group['master']!r}; expected one of {MASTERS}")
    if group["moment_dtype"] in ("8bit", torch.uint8, torch.int8):
        raise ValueError(f"{name}: 8-bit moments are not implemented yet; take torch.bfloat16 or torch.float32")
    if group["moment_dtype"] not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: moment_dtype is {group['moment_dtype']!r}; expected torch.float32 or torch.bfloat16")


def whole(name: str, param: Tensor) -> BoundParam:
    """All of a parameter."""
    return BoundParam(name, param, 0, ((0, param.shape[0] if param.ndim else 1),))


def check_param(part: BoundParam) -> None:
    """Raises ValueError where the parameter is of a sort that does not train here."""
    if not part.param.is_floating_point():
        raise ValueError(f"{part.name} has dtype {part.param.dtype}; HeadAdamW trains real floating-point parameters")
    if part.param.layout != torch.strided:
        raise ValueError(f"{part.name} has layout {part.param.layout}; HeadAdamW trains dense parameters")
    check_shards(part)


def check_grad(slot: Slot) -> None:
    """Raises RuntimeError where the gradient is sparse, ValueError where it does not fit."""
    grad, param = slot.param.grad, slot.param
    if param.dtype != slot.dtype:
        raise ValueError(f"{slot.name} is {param.dtype} and was {slot.dtype} when the optimizer was made")
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
    shape, placed = slot.shape_here, slot.part.full and is_sharded(slot.param)
    for key in (*MOMENTS[:3 if amsgrad else 2], *([slot.low_key] if slot.low_key else [])):
        value = state.get(key)
        if value is None:
            raise ValueError(f"{slot.name}: its state has no {key}; was amsgrad or master switched on after a step?")
        dtype = slot.low_dtype if key in LOW else slot.moment_dtype
        if is_sharded(value) != placed:
            raise ValueError(f"{slot.name}: its {key} is {'a' if is_sharded(value) else 'no'} DTensor, expected"
                             f" {'one' if placed else 'none'}; was the model sharded after the first step?")
        value = local(value)
        if tuple(value.shape) != shape or value.device != slot.param.device or value.dtype != dtype \
                or not value.is_contiguous():
            raise ValueError(f"{slot.name}: its {key} is {list(value.shape)} {value.dtype} on {value.device}, expected"
                             f" {list(shape)} {dtype} on {slot.param.device}, contiguous; was the model moved after"
                             " the first step, or the state replaced?")
