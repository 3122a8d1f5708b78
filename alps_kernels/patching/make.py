"""Making a head patch: from a tuned model in memory, or from two sets of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..selection import BoundSelection, HeadSelection, remembered
from ..tensors import check_type, first_of
from ..weights import Weights, unwrap_model
from .fit import cuts_of, whole_weights
from .patch import HeadPatch, Outside
from .slices_file import TensorSlice, digest, in_threads


def save_patch(model: nn.Module, path: str | os.PathLike, heads: HeadSelection | BoundSelection | None = None, *,
               base: nn.Module | str | os.PathLike | None = None,
               provenance: dict[str, Any] | None = None) -> HeadPatch:
    """Write the selected slices of `model`, and what tells the base they belong to, to one file.

    The bytes outside the slices are the same before and after training the heads, so digests of
    them tell the base; nothing else of the model is written.

    Args:
        path: the file, safetensors; written atomically.
        heads: what to write; default: what was last frozen, sliced or patched on this model.
        base: the model before it was tuned, or its checkpoint folder: the bytes outside the
            selection are then compared here, and those inside too before the patch is applied.
        provenance: anything JSON to keep in the file.

    Returns:
        the patch that was written.

    Raises:
        ValueError: it is not known which heads; something else was trained too; the model
            differs from `base` outside the selection. Nothing is written.
        LayoutError: the model's heads cannot be located, or adapters are beside its weights.
        OSError: the file cannot be written; what was there is untouched.
    """
    inner = unwrap_model(model)
    known = remembered(model) or remembered(inner)
    if heads is None:
        if known is None:
            raise ValueError("nothing says which heads were trained of this model: give heads=")
        heads, rest = known
        if rest == "trainable":
            raise ValueError("everything but the other heads was trained of this model (rest='trainable'), which a "
                             "head patch cannot hold; give heads= to write those slices alone")
    selection = heads.selection if isinstance(heads, BoundSelection) else heads
    check_type("heads", selection, HeadSelection, "a HeadSelection")
    patch = make_patch(whole_weights(inner), selection, base=None if base is None else whole_weights(base),
                       name=Path(path).stem, provenance=provenance)
    patch.save(path)
    return patch


def make_patch(tuned: Weights, selection: HeadSelection, *, base: Weights | None = None, name: str = "patch",
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
    check_type("provenance", provenance, (dict, type(None)), "a dict")
    try:
        json.dumps(provenance, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the provenance is not JSON: {error}") from error
    cuts = cuts_of(selection, tuned)
    if base is not None:
        _check_same_model(base, tuned, cuts_of(selection, base), cuts)
    models = (tuned,) if base is None else (tuned, base)
    read = in_threads(lambda key: _read(key, cuts.get(key), models), tuned.names)
    if moved := [key for key, (digests, *_) in read.items() if len(set(digests)) > 1]:
        if not allow_outside_changes:
            raise ValueError(f"{tuned.name} differs from {base.name} outside the selected slices: {first_of(moved)}; "
                             "a head patch of it would not be the tuned model")
        provenance = {**(provenance or {}), "left_out": moved}
    origin = models[-1]
    outside = {key: Outside(origin.info(key), digests[-1]) for key, (digests, *_) in read.items()}
    return HeadPatch(name, selection, cuts, {key: read[key][2] for key in cuts}, outside,
                     None if base is None else {key: read[key][1] for key in cuts},
                     origin.layout.model_type, type(origin.model).__name__, provenance)


def _read(name: str, cut: TensorSlice | None,
          models: Sequence[Weights]) -> tuple[list[str], str | None, Tensor | None]:
    """Of one parameter digests of what `cut` leaves in each model and of all of it in the base; the tuned slices."""
    tensors = [weights.read([name])[name] for weights in models]
    digests = [digest(*([tensor] if cut is None else cut.rest(tensor))) for tensor in tensors]
    if cut is None:
        return digests, None, None
    return digests, digest(tensors[1]) if tensors[1:] else None, cut.take(tensors[0]).cpu()


def _check_same_model(base: Weights, tuned: Weights, ours: dict[str, TensorSlice],
                      theirs: dict[str, TensorSlice]) -> None:
    if base.layout.model_type != tuned.layout.model_type:
        raise ValueError(f"{base.name} is a {base.layout.model_type} and {tuned.name} a {tuned.layout.model_type}")
    if odd := sorted(set(base.names) ^ set(tuned.names)):
        one, other = (base, tuned) if odd[0] in base.names else (tuned, base)
        raise ValueError(f"{one.name} has {odd[0]} and {other.name} has not: they are not one model")
    for name in base.names:
        if base.info(name) != tuned.info(name):
            raise ValueError(f"{name} is {base.info(name)} in {base.name} and {tuned.info(name)} in {tuned.name}")
    if ours != theirs:
        raise ValueError(f"the heads of {base.name} and {tuned.name} lie differently in their weights")
