"""Parameters that were put in the place of an optimizer's own, as Accelerate does when it shards a model."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..selection import BoundSelection
from .state import Slot


class Known:
    """Which parameters an optimizer was made for; it keeps none of them alive."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._refs = {id(param): weakref.ref(param) for param in params}

    def __contains__(self, param: Tensor) -> bool:
        ref = self._refs.get(id(param))
        return ref is not None and ref() is param


def replaced(params: Sequence[Tensor], known: Known, slots: Mapping[Tensor, Slot], heads: BoundSelection | None,
             state: Mapping[Tensor, dict]) -> tuple[set[Tensor], BoundSelection | None]:
    """Which parameters that trained are gone for others in their place, and `heads` of those others.

    A parameter that was taken out, so that another of the optimizer's moved up, is not among them.

    Args:
        params: the optimizer's, in order, now.
        known: its parameters before.
        slots, heads, state: the optimizer's, of before.

    Raises:
        ValueError: a parameter is of another shape than the one in whose place it is, or that one
            has state already; it is named.
    """
    found: dict[Tensor, Tensor] = {}
    for old in slots.keys() - set(params):
        slot = slots[old]
        new = params[slot.stream] if slot.stream < len(params) else None
        if new is None or new in known:
            continue
        stepped = bool(state.get(old))
        if stepped or (heads is not None and new.shape != old.shape):
            raise ValueError(f"{slot.name} {list(old.shape)} was replaced in the optimizer by a parameter of shape"
                             f" {list(new.shape)}{' after its first step' if stepped else ''}; make the optimizer once the"
                             " model is wrapped or sharded, with heads bound to that model")
        found[old] = new
    if heads is not None and found:
        parts = tuple(replace(part, param=found.get(part.param, part.param)) for part in heads.params)
        heads = replace(heads, params=parts)
    return set(found), heads
