"""The whole weights that patches are made from and checked against: a model in memory, as one sees a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..layout import HeadLayout, LayoutError, find_heads
from .slices_file import dtype_name

# What torch.compile and activation checkpointing put into names.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}

_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[tuple, HeadLayout]] = WeakKeyDictionary()


class Source(Protocol):
    """Every parameter of a model, in memory or in files.

    Attributes:
        name: what to call it in messages and provenance.
        layout: its attention heads, by the names that `names` gives.
        model_type, architecture: of its config and class.
        names: every parameter, tied ones once.
    """

    name: str
    layout: HeadLayout
    model_type: str
    architecture: str
    names: tuple[str, ...]

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a parameter."""

    def read(self, name: str) -> Tensor:
        """A parameter's values."""


class ModelSource:
    """A model in memory; of a sliced one the full weights, with the leaves' values in them.

    Raises:
        LayoutError: its heads cannot be located, or adapters are beside its weights.
        ValueError: a parameter has no values here (meta device, sharded); it is named.
    """

    def __init__(self, model: nn.Module) -> None:
        from ..tensors import sync_weights, synced_slice_of

        self.model = unwrap_model(model)
        self.params = {canonical(name): param for name, param in self.model.named_parameters() if synced_slice_of(param) is None}
        self.names = tuple(self.params)
        self.architecture = self.name = type(self.model).__name__
        for name, param in self.params.items():
            if ".base_layer." in name:
                raise LayoutError(f"{self.name}: {name} has an adapter beside it, which its weight does not show; "
                                  "merge the adapters first (merge_and_unload)")
            if param.is_meta:
                raise ValueError(f"{self.name}: {name} is on the meta device and has no values")
            if param.layout != torch.strided or is_traceable_wrapper_subclass(param):
                raise ValueError(f"{self.name}: {name} is a {type(param).__name__} ({type(param.data).__name__}), sharded or "
                                 "packed; expected a plain tensor (gather the model, or patch its checkpoint)")
        self.layout = _layout(self.model, tuple((name, tuple(param.shape)) for name, param in self.params.items()))
        self.model_type = self.layout.model_type
        sync_weights(self.model)

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self.params[name].shape), dtype_name(self.params[name].dtype)

    def read(self, name: str) -> Tensor:
        return self.params[name].detach()


def _layout(model: nn.Module, shapes: tuple) -> HeadLayout:
    """`find_heads`, remembered for a model of these names and shapes: swaps should not wait for it."""
    known = _LAYOUTS.get(model)
    if known is None or known[0] != shapes:
        known = _LAYOUTS[model] = (shapes, find_heads(model))
    return known[1]


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model itself, without torch.compile's and data parallelism's wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model, not {type(model).__name__}")
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def canonical(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def first_of(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    names = list(names)
    return names[0] + (f" (and {len(names) - 1} more)" if names[1:] else "")
