"""Saved states of the optimizer: made, checked against what trains here, and loaded, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..selection import cut_compact, gather_compact
from ..tensors import placed_like, share_of, viewed
from .groups import check_options
from .state import EIGHT, LOW, MOMENTS, SCALE, Slot

FORMAT, VERSION = "alps_kernels.head_adamw", 1
OURS = ("master", "moment_dtype")  # entries of a param group that torch.optim.AdamW does not have


def saved_state(plain: dict[str, Any], slots: Mapping[int, Slot], seed: int) -> dict[str, Any]:
    """The state dict `plain` that torch makes, in the form that is saved; `slots` by parameter number."""
    state = {key: dict(entry) for key, entry in plain["state"].items()}
    state.update({key: saved_entry(slot, state[key]) for key, slot in slots.items() if state.get(key)})
    groups = [{**group, "moment_dtype": str(group["moment_dtype"]).removeprefix("torch.")}
              for group in plain["param_groups"]]  # torch's gathering of state dicts knows no dtypes
    described = {"format": FORMAT, "version": VERSION, "seed": seed,
                 "params": {key: slot.describe() for key, slot in slots.items()}}
    return {**plain, "state": state, "param_groups": groups, "alps": described}


def dense_state(plain: dict[str, Any], slots: Mapping[int, Slot]) -> dict[str, Any]:
    """The state dict `plain` in the form that torch.optim.AdamW loads."""
    state = {index: {key: value.max() if key == "step" else placed_like(slots[index].param, slots[index].spread(value))
                     for key, value in slots[index].decoded(entry).items() if key == "step" or key in MOMENTS}
             for index, entry in plain["state"].items()}
    groups = [{key: value for key, value in group.items() if key not in OURS} for group in plain["param_groups"]]
    return {"state": state, "param_groups": groups}


def saved_entry(slot: Slot, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state as it is saved. That of a partly selected parameter is of all ranks.

    It has `slices`, and so has that of a sliced model's leaf: int64, the axis that is cut, then the
    start and stop of every span.
    """
    entry, spans = dict(state), slot.within
    if not slot.part.full:
        entry = {key: value if key == "step" or key.endswith(SCALE) else gather_compact(slot.part, value)
                 for key, value in state.items()}
        spans = slot.spans
    if spans is not None:
        entry["slices"] = torch.tensor([slot.part.dim, *(edge for span in spans for edge in span)],
                                       device=slot.param.device)
    if "master_lo" in entry:
        low = entry["master_lo"]
        entry["master_lo"] = viewed(low, lambda held: held.unsqueeze(-1).view(torch.uint8), (*low.shape, 2))
    return entry


def read_saved(saved: Mapping[str, Any], param_groups: Sequence[Mapping], slots: Mapping[Tensor, Slot],
               seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The slots, states and seed of a state dict, and what torch is to load of it; {} where its groups do not fit.

    Args:
        saved: of HeadAdamW, or dense, of torch.optim.AdamW.
        param_groups, slots, seed: the optimizer's own.

    Raises:
        ValueError: it is of another selection, precision or model; the difference is named.
    """
    if not isinstance(saved.get("param_groups"), list) or not isinstance(saved.get("state"), dict):
        raise ValueError(f"expected a state dict with 'state' and 'param_groups'; this has {sorted(map(str, saved))}")
    for position, group in enumerate(saved["param_groups"]):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list) \
                or not all(isinstance(key, (int, str)) for key in group["params"]):
            raise ValueError(f"param group {position} of the state dict has no list of params")
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in param_groups]:
        return {}, saved  # torch says so
    index = {param: (key, group) for ours, group in zip(param_groups, saved["param_groups"], strict=True)
             for param, key in zip(ours["params"], group["params"], strict=True)}
    described = None
    if "alps" in saved:
        described = check_description(saved["alps"], {index[param][0]: slot for param, slot in slots.items()})
        seed = saved["alps"]["seed"]
    slots, states = dict(slots), {}
    for param, slot in slots.items():
        key, group = index[param]
        if entry := saved["state"].get(key):
            if not isinstance(entry, Mapping):
                raise ValueError(f"{slot.name}: its saved state is a {type(entry).__name__}; expected a dict of"
                                 " tensors")
            slots[param], states[param] = read_state(
                slot, entry, described[key] if described else described_by(slot, entry.get("slices")),
                amsgrad=group.get("amsgrad", False), device_step=group.get("capturable", False))
    for number, (ours, theirs) in enumerate(zip(param_groups, saved["param_groups"], strict=True)):
        check_options(f"param group {number} of the state dict", {**ours, "amsgrad": theirs.get("amsgrad", False)})
    groups = [{**theirs, **{key: ours[key] for key in OURS}}
              for theirs, ours in zip(saved["param_groups"], param_groups, strict=True)]
    # Without the state: torch would cast every tensor of it to the parameter's dtype.
    return {"slots": slots, "states": states, "seed": seed}, {**saved, "state": {}, "param_groups": groups}


def read_state(slot: Slot, saved: Mapping[str, Any], described: Mapping[str, Any] | None, *,
               amsgrad: bool, device_step: bool) -> tuple[Slot, dict[str, Tensor]]:
    """A saved state of one parameter, checked and brought to the slot's form.

    Args:
        described: the slot's description beside the saved state (`describe`, already found to
            agree); None for a dense state, as torch.optim.AdamW saves it, which is cut.

    Raises:
        ValueError: an entry is missing or does not fit; it names the parameter and the entry.
    """
    if described is not None:
        slot = replace(slot, spans=tuple((start, stop) for start, stop in described["spans"]))
    state = {"step": _read_step(slot, saved.get("step"), device_step)}
    if described is None:
        return slot, {**state, **_read_dense(slot, saved, amsgrad)}
    for key, (shape, dtype) in slot.layout(amsgrad).items():
        saved_shape = tuple(slot.param.shape) if slot.part.full else (slot.part.numel,)
        value = _read_entry(slot, saved, key, shape if key.endswith(SCALE) else saved_shape)
        if value.dtype != dtype:
            raise ValueError(f"{slot.name}: the saved {key} is {value.dtype}, expected {dtype}")
        if key.endswith(SCALE):
            state[key] = value.clone().to(slot.param.device)
            continue
        held = slot.cut(share_of(slot.param, value)) if slot.part.full else cut_compact(slot.part, value)
        state[key] = slot.placed(held.to(device=slot.param.device))
    return slot, state


def _read_dense(slot: Slot, saved: Mapping[str, Any], amsgrad: bool) -> dict[str, Tensor]:
    """The entries of a state of the parameter's shape, cut, in the slot's dtypes."""
    state, entries = {}, slot.layout(amsgrad)
    for key in (*MOMENTS[:3 if amsgrad else 2], *([slot.low_key] if slot.low_key else [])):
        if saved.get(key) is None and key in LOW:
            state[key] = slot.zeros(*entries[key])
            continue
        value = _read_entry(slot, saved, key, tuple(slot.param.shape))
        dtype = torch.float32 if slot.moment_dtype == EIGHT and key in MOMENTS else entries[key][1]
        state[key] = slot.placed(slot.cut(share_of(slot.param, value)).to(device=slot.param.device, dtype=dtype))
    return slot.encoded(state)


def _read_entry(slot: Slot, saved: Mapping[str, Any], key: str, shape: tuple[int, ...]) -> Tensor:
    """A saved tensor, found to be of this shape."""
    value = saved.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"{slot.name}: the saved state has no {key}")
    if key == "master_lo" and value.dtype == torch.uint8 and value.shape[-1:] == (2,):
        value = viewed(value, lambda held: held.contiguous().view(torch.int16).squeeze(-1), value.shape[:-1])
    if tuple(value.shape) != shape:
        raise ValueError(f"{slot.name}: the saved {key} has shape {list(value.shape)}, expected {list(shape)}"
                         + ("" if shape == tuple(slot.param.shape) else f" ({slot.part.numel} selected elements)"))
    return value


def described_by(slot: Slot, slices: Any) -> dict[str, Any] | None:
    """What `slices` of a saved state say of it, found to be the slot's; None for the state of a whole parameter.

    Raises:
        ValueError: they are of another selection.
    """
    if slices is None or isinstance(slices, Tensor) and slices.is_floating_point():  # torch's AdamW cast them
        return None
    dim, *edges = slices.tolist() if isinstance(slices, Tensor) and slices.ndim == 1 and slices.numel() else [None]
    spans = [list(span) for span in zip(edges[::2], edges[1::2], strict=False)]
    within = slot.part.full and slot.within
    ours = [list(r) for r in within or slot.part.ranges]
    fits = spans == ours if within else not slot.part.full and _subdivide(spans, ours)
    if dim != slot.part.dim or len(edges) % 2 or not fits:
        raise ValueError(f"the saved state is of another selection: {slot.name}: spans {spans} along {dim} there,"
                         f" ranges {ours} along {slot.part.dim} here")
    return None if within else {"spans": spans}


def _read_step(slot: Slot, saved: Any, device_step: bool) -> Tensor:
    if not isinstance(saved, (int, float, Tensor)) or isinstance(saved, bool):
        raise ValueError(f"{slot.name}: the saved state has no step")
    steps = saved.reshape(-1).tolist() if isinstance(saved, Tensor) else [float(saved)]
    if len(steps) not in (1, len(slot.spans)) or not all(0 <= s < 2**53 and s == int(s) for s in steps):
        raise ValueError(f"{slot.name}: the saved step is {saved}; expected a count, or {len(slot.spans)} of them")
    return slot.step_tensor(steps, device_step)


def check_description(described: Any, slots: Mapping[int, Slot]) -> dict[int, dict]:
    """The descriptions of a saved state by parameter index, found to be those of `slots`.

    Raises:
        ValueError: it is no description of ours, or of another selection or precision; the
            first differences are named.
    """
    if not isinstance(described, Mapping) or described.get("format") != FORMAT:
        raise ValueError("the entry 'alps' of the state dict is not HeadAdamW's")
    if described.get("version") != VERSION:
        raise ValueError(f"the state dict has version {described.get('version')!r} of {FORMAT}; "
                         f"this package reads version {VERSION}")
    theirs = described.get("params")
    if not isinstance(theirs, Mapping) or not all(isinstance(entry, Mapping) for entry in theirs.values()):
        raise ValueError("the entry 'alps' of the state dict has no parameters")
    if type(described.get("seed")) is not int or not 0 <= described["seed"] < 2**64:
        raise ValueError(f"the saved seed is {described.get('seed')!r}; expected a whole number below 2**64")
    differences = []
    for index in sorted({*theirs, *slots}, key=str):
        if index not in slots:
            differences.append(f"{theirs[index].get('name')} trained there and does not train here")
        elif index not in theirs:
            differences.append(f"{slots[index].name} trains here and did not there")
        else:
            ours = slots[index].describe()
            differences += [f"{ours['name']}: {key} {theirs[index].get(key)!r} there, {ours.get(key)!r} here"
                            for key in ("shape", "dim", "ranges", "mirrored", "master", "moment_dtype")
                            if theirs[index].get(key) != ours.get(key)]
            if not _subdivide(theirs[index].get("spans"), ours["ranges"]):
                differences.append(f"{ours['name']}: spans {theirs[index].get('spans')!r} do not cut its ranges")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise ValueError("the saved state is of another selection or precision: " + "; ".join(differences[:3]) + more)
    return dict(theirs)


def _subdivide(spans: Any, ranges: list[list[int]]) -> bool:
    """`spans` cover `ranges` exactly, in order."""
    if not isinstance(spans, list) or not all(isinstance(s, (list, tuple)) and len(s) == 2 for s in spans):
        return False
    if not all(type(edge) is int for span in spans for edge in span) or any(a > b for a, b in spans):
        return False
    left = iter([span for span in spans if span[0] < span[1]])
    for start, stop in ranges:
        while start < stop:
            span = next(left, None)
            if span is None or span[0] != start or span[1] > stop:
                return False
            start = span[1]
    return next(left, None) is None


@contextmanager
def all_or_nothing(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """An error or interrupt within leaves groups, state and selection as they were."""
    before, state = dict(optimizer.__dict__), dict(optimizer.state)
    try:
        yield
    except BaseException:
        optimizer.__dict__.clear()
        optimizer.__dict__.update(before)
        optimizer.state.clear()
        optimizer.state.update(state)
        raise
