"""Which parameters of the param groups train: make, check and replace their slots, carry their state."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..selection import BoundParam, BoundSelection, check_shards
from ..tensors import check_type, is_sharded, synced_slice_of
from .state import EIGHT, HALVES, Slot

MASTERS = (None, "split", "kahan", "stochastic")


def make_slots(param_groups: Sequence[Mapping[str, Any]], heads: BoundSelection | None) -> dict[Tensor, Slot]:
    """The slots of all parameters that train.

    Raises:
        ValueError, TypeError: options, parameters or `heads` cannot be trained here; each is named.
    """
    check_type("heads", heads, (BoundSelection, type(None)), "what HeadSelection.bind(model) returns")
    chosen = None if heads is None else {id(part.param): part for part in heads.params}
    slots: dict[Tensor, Slot] = {}
    stream, everything = 0, []
    for index, group in enumerate(param_groups):
        check_options(f"param group {index}", group)
        names = group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            whole = BoundParam(name, param, 0, ((0, param.shape[0] if param.ndim else 1),))
            part = whole if chosen is None else chosen.pop(id(param), None)
            everything.append((name if part is None else part.name, param))
            if part is not None:
                check_param(part)
                slots[param] = slot_of(part, stream, group)
            stream += 1
    if chosen:
        lost = next(iter(chosen.values()))
        raise ValueError(f"{lost.name} holds selected slices but is not among the optimizer's params"
                         f" ({len(chosen)} such); pass model.parameters() of the model that was bound,"
                         " and bind it again after fully_shard, which replaces parameters")
    check_overlaps(everything, slots)
    return slots


def check_options(name: str, group: Mapping[str, Any]) -> None:
    """Raises ValueError where a group's `master`, `moment_dtype` or `differentiable` is not supported."""
    if group["master"] not in MASTERS:
        raise ValueError(f"{name}: master is {group['master']!r}; expected one of {MASTERS}")
    if group["moment_dtype"] not in (torch.float32, torch.bfloat16, EIGHT):
        raise ValueError(f"{name}: moment_dtype is {group['moment_dtype']!r}; expected torch.float32, torch.bfloat16 or"
                         f" {EIGHT!r}")
    if group["moment_dtype"] == EIGHT and group["amsgrad"]:
        raise ValueError(f"{name}: amsgrad has no 8-bit form; take moment_dtype=torch.bfloat16, or amsgrad=False")
    if group["differentiable"]:
        raise ValueError("HeadAdamW is not differentiable: its step writes in place; pass differentiable=False")


def slot_of(part: BoundParam, stream: int, group: Mapping[str, Any]) -> Slot:
    """How what trains of a parameter is kept under a group's options.

    The state of a sliced leaf lies as that of the full weight's selection would: with several
    ranges of columns it is compact, range after range.
    """
    param, slice_ranges = part.param, None
    if group["moment_dtype"] == EIGHT and is_sharded(param):
        raise ValueError(f"{part.name} is a DTensor: 8-bit moments of sharded parameters are not implemented; take"
                         " moment_dtype=torch.bfloat16 or torch.float32")
    if part.full and (synced := synced_slice_of(param)) is not None:
        slice_ranges = synced.ranges
        edges = [0, *accumulate(stop - start for start, stop in slice_ranges)]
        apart = synced.dim == 1 and len(slice_ranges) > 1
        part = BoundParam(part.name, param, synced.dim,
                          tuple(zip(edges[:-1], edges[1:], strict=True)) if apart else ((0, edges[-1]),))
    return Slot(part, part.ranges, stream, group["master"] if param.dtype in HALVES else None,
                torch.float64 if param.dtype == torch.float64 else group["moment_dtype"], param.dtype, slice_ranges)


def check_param(part: BoundParam) -> None:
    """Raises ValueError where the parameter is of a sort that does not train here."""
    if part.param.dtype not in (torch.float64, torch.float32, *HALVES):
        raise ValueError(f"{part.name} has dtype {part.param.dtype}; HeadAdamW trains real floating-point parameters of"
                         " 16 bits or more")
    if part.param.layout != torch.strided:
        raise ValueError(f"{part.name} has layout {part.param.layout}; HeadAdamW trains dense parameters")
    if any(stride == 0 and size > 1 for stride, size in zip(part.param.stride(), part.param.shape, strict=True)):
        raise ValueError(f"{part.name} is expanded: several of its elements are one place in memory; clone it first")
    check_shards(part)


def check_overlaps(named: Iterable[tuple[str, Tensor]], trained: Iterable[Tensor]) -> None:
    """Raises ValueError where a parameter that trains shares memory with another one, which would move with it."""
    spans = sorted((param.data_ptr(), param.data_ptr() + param.nbytes, name, id(param)) for name, param in named
                   if type(param) in (Tensor, nn.Parameter) and param.is_contiguous() and param.numel()
                   and not param.is_meta)
    moving = {id(param) for param in trained}
    for (_, stop, name, one), (start, _, other, two) in pairwise(spans):
        if start < stop and one != two and (one in moving or two in moving):
            raise ValueError(f"{name} and {other} share memory and are two parameters: the one would move with the"
                             " other; make them one parameter, or clone one of them")


def replaced(params: Sequence[Tensor], before: Container[Tensor], slots: Mapping[Tensor, Slot],
             heads: BoundSelection | None, state: Mapping[Tensor, dict]) -> tuple[set[Tensor], BoundSelection | None]:
    """Which parameters that trained are gone for others in their place, and `heads` of those others.

    A parameter that was taken out, so that another of the optimizer's moved up, is not among them.

    Args:
        params: the optimizer's, in order, now.
        before: its parameters when slots were made.
        slots, heads, state: the optimizer's, of then.

    Raises:
        ValueError: a parameter is of another shape than the one in whose place it is, or that one
            has state already; it is named.
    """
    found: dict[Tensor, Tensor] = {}
    for old in slots.keys() - set(params):
        slot = slots[old]
        new = params[slot.stream] if slot.stream < len(params) else None
        if new is None or new in before:
            continue
        stepped = bool(state.get(old))
        if stepped or (heads is not None and new.shape != old.shape):
            raise ValueError(f"{slot.name} {list(old.shape)} was replaced in the optimizer by a parameter of shape"
                             f" {list(new.shape)}{' after its first step' if stepped else ''}; make the optimizer once"
                             " the model is wrapped or sharded, with heads bound to that model")
        found[old] = new
    if heads is not None and found:
        parts = tuple(replace(part, param=found.get(part.param, part.param)) for part in heads.params)
        heads = replace(heads, params=parts)
    return set(found), heads


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
