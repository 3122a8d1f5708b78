"""Checks before a patch is applied: it belongs to this model, and overlaps with no other patch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..selection import HeadSelection, selected_ranges
from ..tensors import first_of, intersect
from ..weights import Checkpoint, ModelWeights, Weights, open_checkpoint, unwrap_model
from .patch import HeadPatch
from .slices_file import TensorSlice, digest, in_threads


def whole_weights(model: nn.Module | str | os.PathLike, config: Any = None) -> Weights:
    """Every parameter of a model in memory or of a checkpoint folder, byte for byte.

    Args:
        config: used instead of the folder's config.json: a path, dict or PretrainedConfig.

    Raises:
        FileNotFoundError: there is no such folder.
        LayoutError: its heads cannot be located, or adapters are beside its weights.
        ValueError: a parameter has no values here (meta device, sharded), or it is no checkpoint,
            lacks a tensor, or is quantised.
    """
    if isinstance(model, nn.Module):
        weights = ModelWeights(model, type(unwrap_model(model)).__name__, cached_layout=True)
    elif not isinstance(weights := open_checkpoint(model, config=config), Checkpoint):
        raise ValueError(f"{os.fspath(model)} is a GGUF file; expected a checkpoint folder (convert it with "
                         "transformers' from_pretrained and save_pretrained)")
    weights.prepare(weights.names, exact=True)
    return weights


def cuts_of(selection: HeadSelection, weights: Weights) -> dict[str, TensorSlice]:
    """What `selection` means on a model, by parameter.

    Raises:
        ValueError: the model has other heads than the selection was made for.
    """
    return {name: TensorSlice(*weights.info(name), dim, ranges)
            for name, (dim, ranges) in selected_ranges(selection, weights.layout).items()}


def check_fits(patch: HeadPatch, weights: Weights, *,
               original: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
               verify: bool = True) -> None:
    """The patch belongs to this very model.

    Args:
        original: gives a parameter with its bytes as they were before other patches.
        verify: compare the digests of all bytes; False: names, shapes, dtypes and heads only.

    Raises:
        ValueError: it does not; the message names the patch, the parameter and the difference.
    """
    def refuse(what: str) -> None:
        raise ValueError(f"patch {patch.name!r} does not fit {weights.name}: {what}")

    if patch.model_type != weights.layout.model_type:
        refuse(f"it is of a {patch.model_type}, this is a {weights.layout.model_type}")
    if odd := sorted(set(patch.outside) ^ set(weights.names)):
        refuse(f"{odd[0]} is a parameter of " + ("the base only" if odd[0] in patch.outside else "this model only"))
    for name, known in patch.outside.items():
        there, here = known.info, weights.info(name)
        if there != here:
            refuse(f"{name} is {there} there and {here} here"
                   + ("; slices of another dtype would not be exact" if there.shape == here.shape else ""))
    if patch.selection.heads_per_layer != weights.layout.heads_per_layer:
        refuse(f"its selection is of {sum(patch.selection.heads_per_layer)} heads, "
               f"this model has {weights.layout.n_heads}")
    cuts = cuts_of(patch.selection, weights)
    for name in sorted({*cuts, *patch.cuts}):
        if cuts.get(name) != patch.cuts.get(name):
            refuse(f"its heads {cuts.get(name, 'nothing')} of {name} here, "
                   f"and it holds {patch.cuts.get(name, 'nothing')}")
    if not verify:
        return

    def differs(name: str) -> str | None:
        tensor, cut = original(name, weights.read([name])[name]), patch.cuts.get(name)
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


def check_apart(weights: Weights, one: HeadPatch, other: HeadPatch) -> None:
    """Raises ValueError where two patches change the same slices; the first one and its heads are named."""
    for name in (name for name in one.cuts if name in other.cuts):
        a, b = one.cuts[name], other.cuts[name]
        shared = intersect(a.ranges, b.ranges)
        if a.dim == b.dim and not shared:
            continue
        layer = next(layer for layer in weights.layout.layers if any(part.param == name for part in layer.parts))
        mine, theirs = (sorted(head for at, head in patch.selection if at == layer.index) for patch in (one, other))
        both = sorted(set(one.selection) & set(other.selection))
        what = (f"both hold head {both[0]}" if both else
                f"heads {theirs} and {mine} of layer {layer.index} share key/value groups")
        raise ValueError(f"patch {other.name!r} overlaps with {one.name!r}: {what} "
                         f"({'columns' if a.dim else 'rows'} {list(shared[0]) if shared else '?'} of {name})")
