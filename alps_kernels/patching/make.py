"""Making a head patch from two models, or one, and checking that one fits a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..selection import HeadSelection, selected_ranges
from ..tensors import merge
from .patch import HeadPatch, Outside
from .slices_file import TensorSlice, digest, in_threads
from .source import Source, canonical, first_of


def cuts_of(selection: HeadSelection, source: Source) -> dict[str, TensorSlice]:
    """What `selection` means on a model, by parameter.

    Raises:
        ValueError: the model has other heads than the selection was made for.
    """
    cuts = {}
    for name, (dim, ranges) in selected_ranges(selection, source.layout).items():
        if canonical(name) in source.names:
            cuts[canonical(name)] = TensorSlice(*source.facts(canonical(name)), dim, ranges)
        else:
            raise ValueError(f"{source.name} has no parameter {name}, which its heads are in")
    return cuts


def make_patch(tuned: Source, selection: HeadSelection, *, base: Source | None = None, name: str = "patch",
               provenance: dict[str, Any] | None = None, allow_outside_changes: bool = False) -> HeadPatch:
    """The slices of `selection` out of `tuned`, and what tells the base they belong to.

    Args:
        base: the model that was tuned, if it is at hand: the bytes outside the selection are
            compared, and the patch can later be checked completely.
        allow_outside_changes: go on where those bytes differ. The patch then belongs to `base`,
            and base plus patch is not the tuned model.

    Raises:
        ValueError: the two are not one model with other slices; it names the parameter.
    """
    if provenance is not None and not isinstance(provenance, dict):
        raise TypeError(f"provenance is a {type(provenance).__name__}; expected a dict")
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the provenance is not JSON: {error}") from error
    cuts = cuts_of(selection, tuned)
    if base is not None:
        _check_same_model(base, tuned, cuts_of(selection, base), cuts)
    read = in_threads(lambda key: _read(key, cuts.get(key), tuned, base), tuned.names)
    if moved := [key for key, (ours, theirs, *_) in read.items() if base is not None and ours != theirs]:
        if not allow_outside_changes:
            raise ValueError(f"{tuned.name} differs from {base.name} outside the selected slices: {first_of(moved)}; "
                             "a head patch of it would not be the tuned model")
        provenance = {**(provenance or {}), "left_out": moved}
    source = base if base is not None else tuned
    outside = {key: Outside(*source.facts(key), theirs if base is not None else ours)
               for key, (ours, theirs, *_) in read.items()}
    return HeadPatch(name, selection, cuts, {key: read[key][3] for key in cuts}, outside,
                     None if base is None else {key: read[key][2] for key in cuts},
                     source.model_type, source.architecture, provenance)


def _read(name: str, cut: TensorSlice | None, tuned: Source, base: Source | None) -> tuple[str, str | None, str | None, Tensor | None]:
    """Digests of one parameter: outside in `tuned` and `base`, all of it in `base`; the tuned slices."""
    ours = tuned.read(name)
    theirs = None if base is None else base.read(name)
    if cut is None:
        return digest(ours), None if theirs is None else digest(theirs), None, None
    values = cut.take(ours).cpu()
    if theirs is None:
        return digest(*cut.rest(ours)), None, None, values
    return digest(*cut.rest(ours)), digest(*cut.rest(theirs)), digest(theirs), values


def _check_same_model(base: Source, tuned: Source, ours: dict[str, TensorSlice], theirs: dict[str, TensorSlice]) -> None:
    if base.model_type != tuned.model_type:
        raise ValueError(f"{base.name} is a {base.model_type} and {tuned.name} a {tuned.model_type}")
    if odd := sorted(set(base.names) ^ set(tuned.names)):
        one, other = (base, tuned) if odd[0] in base.names else (tuned, base)
        raise ValueError(f"{one.name} has {odd[0]} and {other.name} has not: they are not one model")
    for name in base.names:
        if base.facts(name) != tuned.facts(name):
            raise ValueError(f"{name} is {_said(base.facts(name))} in {base.name} and {_said(tuned.facts(name))} in {tuned.name}")
    if ours != theirs:
        raise ValueError(f"the heads of {base.name} and {tuned.name} lie differently in their weights")


def check_fits(patch: HeadPatch, source: Source, *, original: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
               verify: bool = True) -> None:
    """The patch belongs to this very model.

    Args:
        original: gives a parameter with its bytes as they were before other patches.
        verify: compare the digests of all bytes; False: names, shapes, dtypes and heads only.

    Raises:
        ValueError: it does not; the message names the patch, the parameter and the difference.
    """
    def refuse(what: str) -> None:
        raise ValueError(f"patch {patch.name!r} does not fit {source.name}: {what}")

    if patch.model_type != source.model_type:
        refuse(f"it is of a {patch.model_type}, this is a {source.model_type}")
    if odd := sorted(set(patch.outside) ^ set(source.names)):
        refuse(f"{odd[0]} is a parameter of " + ("the base only" if odd[0] in patch.outside else "this model only"))
    for name, known in patch.outside.items():
        if (known.shape, known.dtype) != source.facts(name):
            refuse(f"{name} is {_said((known.shape, known.dtype))} there and {_said(source.facts(name))} here"
                   + ("; slices of another dtype would not be exact" if known.shape == source.facts(name)[0] else ""))
    if patch.selection.heads_per_layer != source.layout.heads_per_layer:
        refuse(f"its selection is of {sum(patch.selection.heads_per_layer)} heads, this model has {source.layout.n_heads}")
    cuts = cuts_of(patch.selection, source)
    for name in sorted({*cuts, *patch.cuts}):
        if cuts.get(name) != patch.cuts.get(name):
            refuse(f"its heads {_where(cuts.get(name))} of {name} here, and it holds {_where(patch.cuts.get(name))}")
    if not verify:
        return

    def differs(name: str) -> str | None:
        tensor, cut = source.read(name), patch.cuts.get(name)
        tensor = original(name, tensor)
        if cut is not None and patch.base is not None and digest(tensor) == patch.base[name]:
            return None
        if digest(*([tensor] if cut is None else cut.rest(tensor))) != patch.outside[name].digest:
            return "outside"
        return "inside" if cut is not None and patch.base is not None else None

    found = in_threads(differs, patch.outside)
    for place, said in (("outside", "is not the base's outside the patched slices"),
                        ("inside", "is not the base's where the patch would go (trained, or patched already?)")):
        if names := [name for name, where in found.items() if where == place]:
            refuse(f"{first_of(names)} {said}")


def check_apart(source: Source, one: HeadPatch, other: HeadPatch) -> None:
    """Raises ValueError where two patches change the same slices; the first one and its heads are named."""
    for name in (name for name in one.cuts if name in other.cuts):
        a, b = one.cuts[name], other.cuts[name]
        shared = merge((max(x[0], y[0]), min(x[1], y[1])) for x in a.ranges for y in b.ranges)
        if a.dim == b.dim and not shared:
            continue
        layer = next(layer for layer in source.layout.layers
                     if any(part.param == name for unit in (*layer.heads, *layer.groups) for part in unit))
        mine, theirs = (sorted(head for at, head in patch.selection if at == layer.index) for patch in (one, other))
        both = sorted(set(one.selection) & set(other.selection))
        what = (f"both hold head {both[0]}" if both else
                f"heads {theirs} and {mine} of layer {layer.index} share key/value groups")
        raise ValueError(f"patch {other.name!r} overlaps with {one.name!r}: {what} "
                         f"({'columns' if a.dim else 'rows'} {list(shared[0]) if shared else '?'} of {name})")


def _said(facts: tuple[tuple[int, ...], str]) -> str:
    return f"{facts[1]} {list(facts[0])}"


def _where(cut: TensorSlice | None) -> str:
    return "nothing" if cut is None else f"{'columns' if cut.dim else 'rows'} {[list(span) for span in cut.ranges]}"
