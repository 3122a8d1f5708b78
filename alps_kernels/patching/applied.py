"""Record of the patches applied to each model, and the write of their slices: all of them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..selection import HeadSelection, remember, remembered
from ..tensors import leaf_of, synced_slice_of
from ..weights import ModelWeights, unwrap_model
from .patch import HeadPatch
from .slices_file import TensorSlice

Writes = list[tuple[str, TensorSlice, Tensor]]  # parameter, which part of it, values of that part


@dataclass(frozen=True, eq=False)
class Applied:
    """One patch on a model and the bytes it replaced, on the parameters' devices."""

    patch: HeadPatch
    originals: dict[str, Tensor]

    @property
    def undoing(self) -> Writes:
        """What puts the replaced bytes back."""
        return [(name, self.patch.cuts[name], values) for name, values in self.originals.items()]


@dataclass(frozen=True, eq=False)
class State:
    """All patches on a model.

    Attributes:
        trained: what was remembered of the model before the first patch.
        told: what is remembered because of the patches.
    """

    applied: tuple[Applied, ...] = ()
    trained: tuple[HeadSelection, str] | None = None
    told: tuple[HeadSelection, str] | None = None


_STATES: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()


def state_of(model: nn.Module) -> State:
    """The patches on a model without wrappers."""
    return _STATES.get(model, State())


def applied_patches(model: nn.Module) -> tuple[str, ...]:
    """The names of the patches that are on `model`, in the order they came."""
    return tuple(entry.patch.name for entry in state_of(unwrap_model(model)).applied)


def commit(model: nn.Module, weights: ModelWeights, writes: Writes, state: State) -> None:
    """Make all writes and take the new state, or neither."""
    models = {id(m): m for m in (model, weights.model)}.values()
    before = [(name, cut, cut.take(weights.read([name])[name])) for name, cut, _ in writes]
    known, trained = state_of(weights.model), [remembered(m) for m in models]
    try:
        for name, cut, values in writes:
            _write(weights, name, cut, values)
        _register(weights.model, models, state, [state.told] * len(models))
    except BaseException:
        _restore(weights, before)
        _register(weights.model, models, known, trained)
        raise


def _register(inner: nn.Module, models: Iterable[nn.Module], state: State,
              trained: Sequence[tuple[HeadSelection, str] | None]) -> None:
    for model, entry in zip(models, trained, strict=True):
        remember(model, entry)
    if state.applied:
        _STATES[inner] = state
    else:
        _STATES.pop(inner, None)


@torch.no_grad()  # a `with` of our own could be left by an interrupt on its last line, and gradients stay off
def _write(weights: ModelWeights, name: str, cut: TensorSlice, values: Tensor) -> None:
    param = weights.params[name]
    # A model that was loaded in inference mode is writable only there.
    put = torch.inference_mode()(cut.put) if param.is_inference() else cut.put
    put(values, param.detach())
    if (leaf := leaf_of(param)) is not None:
        synced = synced_slice_of(leaf)
        leaf.copy_(synced.cut(param))
        synced.written(leaf)


def _restore(weights: ModelWeights, before: Writes) -> None:
    """Undo writes; a further interrupt does not stop it."""
    for name, cut, values in reversed(before):
        while True:
            try:
                _write(weights, name, cut, values)
                break
            except KeyboardInterrupt:
                continue
