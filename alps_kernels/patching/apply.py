"""`apply_patch` and `revert_patch`: swap the slices of some heads in and out of a model in memory, byte for byte.

What a patch replaces is kept in memory, so that reverting restores the very bytes; adding and
subtracting differences of 16-bit weights would not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from ..selection import HeadSelection, remembered, selected_ranges
from ..tensors import Range, merge
from ..weights import ModelWeights, unwrap_model
from .applied import Applied, State, commit, state_of
from .fit import check_apart, check_fits, whole_weights
from .patch import HeadPatch, PatchLike, loaded, several


def apply_patch(model: nn.Module, patches: PatchLike | Sequence[PatchLike], *, replace: bool = False,
                verify: bool = True) -> tuple[str, ...]:
    """Put the slices of one patch, or of several on separate heads, into `model`, in place.

    Everything is checked first and the replaced bytes are kept; on any error or interrupt the
    model is as it was. No weight is reallocated. Make optimizers after applying: what an earlier
    one remembers of these weights (split masters, moments) is of the old values.

    Args:
        patches: a file, a `HeadPatch`, or a sequence of them.
        replace: first take out the patches that are on the model, as part of the same step.
        verify: compare the digests of the whole model, one read of all weights. False: check
            names, shapes, dtypes and heads only, for swaps on a model that is known.

    Returns:
        the names of all patches that are now on the model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is torn or foreign; a patch is of another base, dtype or model; two
            patches change the same slices; a name is taken. The model is as it was.
    """
    incoming = [loaded(patch) for patch in several(patches)]
    weights = whole_weights(unwrap_model(model))
    state = state_of(weights.model)
    now = state.applied
    leaving, staying = (now, ()) if replace else ((), now)
    for at, patch in enumerate(incoming):
        for other in (*(entry.patch for entry in staying), *incoming[:at]):
            if other.name == patch.name:
                raise ValueError(f"a patch called {patch.name!r} is already there: revert it, "
                                 "or apply with replace=True")
            check_apart(weights, other, patch)

    def original(name: str, tensor: Tensor) -> Tensor:
        held = [entry for entry in now if name in entry.originals]
        tensor = tensor.clone() if held else tensor
        for entry in held:
            entry.patch.cuts[name].put(entry.originals[name], tensor)
        return tensor

    _check_unchanged(weights, now)
    for patch in incoming:
        check_fits(patch, weights, original=original, verify=verify)
    writes, applied = [write for entry in leaving for write in entry.undoing], staying
    for patch in incoming:
        kept = {name: cut.take(original(name, weights.read([name])[name])) for name, cut in patch.cuts.items()}
        applied = (*applied, Applied(patch, kept))
        writes += [(name, patch.cuts[name], values.to(weights.params[name].device))
                   for name, values in patch.values.items()]
    current = remembered(model) or remembered(weights.model)
    trained = state.trained if current == state.told else current
    commit(model, weights, writes, State(applied, trained, _told(weights, applied) if applied else trained))
    return tuple(entry.patch.name for entry in applied)


def revert_patch(model: nn.Module, which: PatchLike | Sequence[PatchLike] | None = None) -> tuple[str, ...]:
    """Take patches out of `model`: every byte they replaced is what it was, whatever happened since.

    Args:
        which: names, files or patches to take out; default: all.

    Returns:
        the names of the patches that are still on the model.

    Raises:
        ValueError: no such patch is on the model, or its weights have another dtype or shape
            by now. The model is as it was.
    """
    weights = whole_weights(unwrap_model(model))
    state = state_of(weights.model)
    if not state.applied:
        raise ValueError("no patch is on this model")
    names = {entry.patch.name for entry in state.applied}
    if which is not None:
        wanted = {_name(p, names) for p in several(which)}
        if unknown := sorted(map(repr, wanted - names)):
            raise ValueError(f"no patch called {unknown[0]} is on this model; there is {sorted(names)}")
        names = wanted
    leaving = [entry for entry in state.applied if entry.patch.name in names]
    _check_unchanged(weights, leaving)
    writes = [write for entry in leaving for write in entry.undoing]
    staying = tuple(entry for entry in state.applied if entry.patch.name not in names)
    told = _told(weights, staying) if staying else state.trained
    current = remembered(model) or remembered(weights.model)
    # A selection that was frozen after the patches came is the user's later word.
    commit(model, weights, writes, State(staying, state.trained, told if current == state.told else current))
    return tuple(entry.patch.name for entry in staying)


def _name(patch: PatchLike, names: set[str]) -> str:
    """What a patch is called on a model: its name, or that of its file."""
    if isinstance(patch, HeadPatch):
        return patch.name
    text = os.fspath(patch)
    return text if text in names else Path(text).stem


def _check_unchanged(weights: ModelWeights, applied: Iterable[Applied]) -> None:
    """The parameters are still those that the originals fit."""
    for entry in applied:
        for name, cut in entry.patch.cuts.items():
            if name not in weights.params or weights.info(name) != cut.info:
                now = f"is {weights.info(name)}" if name in weights.params else "is gone"
                raise ValueError(f"{name} was {cut.info} when patch {entry.patch.name!r} was applied and "
                                 f"{now} now: the replaced bytes do not fit")


def _told(weights: ModelWeights, applied: Sequence[Applied]) -> tuple[HeadSelection, str] | None:
    """The selection that is all of the patches; None where no one selection is."""
    selection = applied[0].patch.selection
    try:
        for entry in applied[1:]:
            selection = selection | entry.patch.selection
    except ValueError:  # of other parts, or another key/value policy
        return None
    held: dict[str, list[Range]] = {}
    for entry in applied:
        for name, cut in entry.patch.cuts.items():
            held.setdefault(name, []).extend(cut.ranges)
    meant = {name: ranges for name, (_, ranges) in selected_ranges(selection, weights.layout).items()}
    return (selection, "frozen") if meant == {name: merge(ranges) for name, ranges in held.items()} else None
