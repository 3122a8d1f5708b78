"""The head patch on a model: save the tuned slices of some heads, swap them in and out, byte for byte.

What a patch replaces is kept in memory, so that reverting restores the very bytes; adding and
subtracting differences of 16-bit weights would not.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..selection import BoundSelection, HeadSelection, forget, remember, remembered, selected_ranges
from ..tensors import merge
from .make import check_apart, check_fits, make_patch
from .patch import HeadPatch
from .slices_file import TensorSlice
from .source import ModelSource, canonical, unwrap_model

PatchLike = Union[str, os.PathLike, HeadPatch]


@dataclass(frozen=True, eq=False)
class _Applied:
    """One patch on a model and the bytes it replaced, on the parameters' devices."""

    patch: HeadPatch
    originals: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.patch.name


@dataclass(frozen=True, eq=False)
class _State:
    """All patches on a model.

    Attributes:
        trained: what was remembered of the model before the first patch.
        told: what is remembered because of the patches.
    """

    applied: tuple[_Applied, ...]
    trained: tuple[HeadSelection, str] | None
    told: tuple[HeadSelection, str] | None


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def save_patch(model: nn.Module, path: str | os.PathLike, heads: HeadSelection | BoundSelection | None = None, *,
               base: nn.Module | str | os.PathLike | None = None, provenance: dict[str, Any] | None = None) -> HeadPatch:
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
    known = remembered(model) or remembered(unwrap_model(model))
    if heads is None:
        if known is None:
            raise ValueError("nothing says which heads were trained of this model: give heads=")
        heads, rest = known
        if rest == "trainable":
            raise ValueError("everything but the other heads was trained of this model (rest='trainable'), which a head "
                             "patch cannot hold; give heads= to write those slices alone")
    selection = heads.selection if isinstance(heads, BoundSelection) else heads
    if not isinstance(selection, HeadSelection):
        raise TypeError(f"heads is a {type(heads).__name__}; expected a HeadSelection")
    patch = make_patch(ModelSource(model), selection, base=None if base is None else _source(base),
                       name=Path(path).stem, provenance=provenance)
    patch.save(path)
    return patch


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
    incoming = [p if isinstance(p, HeadPatch) else HeadPatch.load(p) for p in _several(patches)]
    source = ModelSource(model)
    now = _STATES[source.model].applied if source.model in _STATES else ()
    leaving, staying = (now, ()) if replace else ((), now)
    for at, patch in enumerate(incoming):
        for other in (*(entry.patch for entry in staying), *incoming[:at]):
            _check_apart(source, other, patch)

    def original(name: str, tensor: Tensor) -> Tensor:
        held = [entry for entry in now if name in entry.originals]
        tensor = tensor.clone() if held else tensor
        for entry in held:
            entry.patch.cuts[name].put(entry.originals[name], tensor)
        return tensor

    _check_unchanged(source, now)
    for patch in incoming:
        check_fits(patch, source, original=original, verify=verify)
    coming = []
    for patch in incoming:
        values = {name: values.to(source.params[name].device) for name, values in patch.values.items()}
        kept = {name: cut.take(original(name, source.read(name))) for name, cut in patch.cuts.items()}
        coming.append((patch, values, kept))
    writes = [(name, entry.patch.cuts[name], value) for entry in leaving for name, value in entry.originals.items()]
    writes += [(name, patch.cuts[name], value) for patch, values, _ in coming for name, value in values.items()]
    applied = (*staying, *(_Applied(patch, kept) for patch, _, kept in coming))
    current = remembered(model) or remembered(source.model)
    state = _STATES.get(source.model)
    trained = state.trained if state is not None and current == state.told else current
    _commit(model, source, writes, _State(applied, trained, _told(source, applied) if applied else trained))
    return tuple(entry.name for entry in applied)


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
    source = ModelSource(model)
    state = _STATES.get(source.model)
    if state is None:
        raise ValueError("no patch is on this model")
    names = {entry.name for entry in state.applied}
    if which is not None:
        wanted = {_name(p, names) for p in _several(which)}
        if unknown := sorted(map(repr, wanted - names)):
            raise ValueError(f"no patch called {unknown[0]} is on this model; there is {sorted(names)}")
        names = wanted
    leaving = [entry for entry in state.applied if entry.name in names]
    _check_unchanged(source, leaving)
    writes = [(name, entry.patch.cuts[name], value) for entry in leaving for name, value in entry.originals.items()]
    staying = tuple(entry for entry in state.applied if entry.name not in names)
    told = _told(source, staying) if staying else state.trained
    current = remembered(model) or remembered(source.model)
    # A selection that was frozen after the patches came is the user's later word.
    _commit(model, source, writes, _State(staying, state.trained, told if current == state.told else current))
    return tuple(entry.name for entry in staying)


def applied_patches(model: nn.Module) -> tuple[str, ...]:
    """The names of the patches that are on `model`, in the order they came."""
    state = _STATES.get(unwrap_model(model))
    return () if state is None else tuple(entry.name for entry in state.applied)


def _source(model: nn.Module | str | os.PathLike) -> Any:
    if isinstance(model, nn.Module):
        return ModelSource(model)
    from .checkpoint import CheckpointSource

    return CheckpointSource(model)


def _several(patches: PatchLike | Sequence[PatchLike]) -> list[PatchLike]:
    if isinstance(patches, (str, os.PathLike, HeadPatch)):
        return [patches]
    if not isinstance(patches, (list, tuple)):
        raise TypeError(f"a patch is a {type(patches).__name__}; expected a file or a HeadPatch")
    for patch in patches:
        if not isinstance(patch, (str, os.PathLike, HeadPatch)):
            raise TypeError(f"a patch is a {type(patch).__name__}; expected a file or a HeadPatch")
    return list(patches)


def _name(patch: PatchLike, names: set[str]) -> str:
    """What a patch is called on a model: its name, or that of its file."""
    if isinstance(patch, HeadPatch):
        return patch.name
    text = os.fspath(patch)
    return text if text in names else Path(text).stem


def _check_apart(source: ModelSource, one: HeadPatch, other: HeadPatch) -> None:
    """Raises ValueError where two patches have one name or change the same slices; the heads are named."""
    if one.name == other.name:
        raise ValueError(f"a patch called {one.name!r} is already there: revert it, or apply with replace=True")
    check_apart(source, one, other)


def _check_unchanged(source: ModelSource, applied: Iterable[_Applied]) -> None:
    """The parameters are still those that the originals fit."""
    for entry in applied:
        for name, cut in entry.patch.cuts.items():
            if name not in source.params or source.facts(name) != (cut.shape, cut.dtype):
                now = f"is {source.facts(name)[1]} {list(source.facts(name)[0])}" if name in source.params else "is gone"
                raise ValueError(f"{name} was {cut.dtype} {list(cut.shape)} when patch {entry.name!r} was applied and "
                                 f"{now} now: the replaced bytes do not fit")


def _told(source: ModelSource, applied: Sequence[_Applied]) -> tuple[HeadSelection, str] | None:
    """The selection that is all of the patches; None where no one selection is."""
    selection = applied[0].patch.selection
    try:
        for entry in applied[1:]:
            selection = selection | entry.patch.selection
    except ValueError:  # of other parts, or another key/value policy
        return None
    held: dict[str, list[tuple[int, int]]] = {}
    for entry in applied:
        for name, cut in entry.patch.cuts.items():
            held.setdefault(name, []).extend(cut.ranges)
    meant = {canonical(name): ranges for name, (_, ranges) in selected_ranges(selection, source.layout).items()}
    return (selection, "frozen") if meant == {name: merge(ranges) for name, ranges in held.items()} else None


def _commit(model: nn.Module, source: ModelSource, writes: list[tuple[str, TensorSlice, Tensor]], state: _State) -> None:
    """Make all writes and take the new state, or neither."""
    models = {id(m): m for m in (model, source.model)}.values()
    before = [(name, cut, cut.take(source.read(name))) for name, cut, _ in writes]
    known, trained = _STATES.get(source.model), [remembered(m) for m in models]
    try:
        for name, cut, values in writes:
            _write(source, name, cut, values)
        _register(source.model, models, state if state.applied else None, [state.told] * len(models))
    except BaseException:
        _restore(source, before)
        _register(source.model, models, known, trained)
        raise


def _register(inner: nn.Module, models: Iterable[nn.Module], state: _State | None,
              trained: Sequence[tuple[HeadSelection, str] | None]) -> None:
    for model, entry in zip(models, trained, strict=True):
        if entry is None:
            forget(model)
        else:
            remember(model, *entry)
    if state is None:
        _STATES.pop(inner, None)
    else:
        _STATES[inner] = state


@torch.no_grad()  # a `with` of our own could be left by an interrupt on its last line, and gradients stay off
def _write(source: ModelSource, name: str, cut: TensorSlice, values: Tensor) -> None:
    from ..tensors import leaf_of, synced_slice_of

    param = source.params[name]
    # A model that was loaded in inference mode is writable only there.
    put = torch.inference_mode()(cut.put) if param.is_inference() else cut.put
    put(values, param.detach())
    if (leaf := leaf_of(param)) is not None:
        mirror = synced_slice_of(leaf)
        leaf.copy_(mirror.cut(param))
        mirror.written(leaf)


def _restore(source: ModelSource, before: list[tuple[str, TensorSlice, Tensor]]) -> None:
    """Undo writes; a further interrupt does not stop it."""
    for name, cut, values in reversed(before):
        while True:
            try:
                _write(source, name, cut, values)
                break
            except KeyboardInterrupt:
                continue
