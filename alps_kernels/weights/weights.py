"""The weights of one model: the protocol, and models in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..layout import AttentionLayer, HeadLayout, LayoutError, find_heads
from ..tensors import sync_weights, synced_slice_of
from .tensor_files import FLOATS, TensorInfo

# What torch.compile and activation checkpointing put into names.
WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}

PLAIN = (bool, int, float, str, tuple, type(None))
_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[tuple, HeadLayout]] = WeakKeyDictionary()


class Weights(Protocol):
    """Every parameter of a model, in memory or in files.

    Attributes:
        name: what to call it in messages and provenance.
        model: the model without wrappers; on the meta device where its weights are in files.
        model_type: its config's, None where it has no config.
        layout: its attention heads, by the names that `names` gives.
        names: every parameter, tied ones once.
        in_memory: reading costs nothing.
    """

    name: str
    model: nn.Module
    model_type: str | None
    layout: HeadLayout
    names: tuple[str, ...]
    in_memory: bool

    def prepare(self, names: Iterable[str], *, exact: bool = False) -> None:
        """Check that these parameters can be read, before anything is read of them.

        Args:
            exact: all their bytes are wanted, of any dtype; False: their values, in floating point.
        """

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a prepared parameter."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of prepared parameters by name, each of its own shape."""


class ModelWeights:
    """The weights of a model in memory; of a sliced model the full weights, with the leaves' values in them.

    Names are those of the model itself, without what torch.compile and its like put into them.

    Args:
        cached_layout: take the layout that was found last for this model, if it still states the same.

    Raises:
        LayoutError: its heads cannot be located, or adapters are still beside its attention weights.
    """

    in_memory = True

    def __init__(self, model: nn.Module, name: str | None = None, *, cached_layout: bool = False) -> None:
        self.model = unwrap_model(model)
        config = next((c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None), None)
        self.model_type = getattr(config, "model_type", None)
        given = os.path.basename(str(getattr(config, "name_or_path", "") or ""))
        self.name = name or given or type(self.model).__name__
        self.params: dict[str, Tensor] = {canonical(key): param for key, param in self.model.named_parameters()
                                          if synced_slice_of(param) is None}
        self.names = tuple(self.params)
        self.layout = (_cached_layout(self.model, self.params) if cached_layout else
                       _canonical_layout(find_heads(self.model)))
        self._check_adapters(self.layout.shapes)

    def replace(self, params: Mapping[str, Tensor]) -> None:
        """Take these values instead of the model's own, which is not touched."""
        params = {canonical(key): value for key, value in params.items()}
        if strange := [key for key, value in params.items() if self.layout.shapes.get(key) != tuple(value.shape)]:
            raise ValueError(f"{self.name}: {strange[0]} is no attention weight, or not of shape "
                             f"{list(params[strange[0]].shape)}")
        self.params.update(params)

    def prepare(self, names: Iterable[str], *, exact: bool = False) -> None:
        """See `Weights.prepare`; the full weights of a sliced model are brought up to date.

        Raises:
            LayoutError: adapters are beside a weight.
            ValueError: a parameter is on the meta device, of a dtype that is no float or, if its
                bytes are wanted, sharded or packed; it is named.
        """
        names = list(names)
        self._check_adapters(names)
        for name in names:
            param = self.params[name]
            if param.is_meta:
                raise ValueError(f"{self.name}: {name} is on the meta device and has no values" + (
                    "" if exact else "; load the model, or give its checkpoint folder instead"))
            if exact and (param.layout != torch.strided or is_traceable_wrapper_subclass(param)):
                raise ValueError(f"{self.name}: {name} is a {type(param).__name__} ({type(param.data).__name__}), "
                                 "sharded or packed; expected a plain tensor (gather the model, or patch its "
                                 "checkpoint)")
            if not exact and TensorInfo.of(param).dtype not in FLOATS:
                raise ValueError(f"{self.name}: {name} has dtype {param.dtype}; "
                                 "expected floating point of 16 bits or more")
        sync_weights(self.model)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo.of(self.params[name])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.params[name].detach() for name in names}

    def _check_adapters(self, names: Iterable[str]) -> None:
        if wrapped := [name for name in names if ".base_layer." in name]:
            raise LayoutError(f"{self.name}: {wrapped[0]} has an adapter beside it, which its weight does not show; "
                              "merge the adapters first (merge_and_unload)")


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
    """A parameter's or module's name without what wrappers inside the model put into it."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _cached_layout(model: nn.Module, params: Mapping[str, Tensor]) -> HeadLayout:
    """`find_heads` by canonical names, cached for a model that states the same: swaps should not wait for it.

    It reads names, shapes, and what modules and their configurations state in numbers and words.
    """
    shapes, modules = tuple((name, tuple(param.shape)) for name, param in params.items()), [*model.modules()]
    stated = tuple((type(module), *((name, value) for name, value in vars(module).items()
                                    if type(value) in PLAIN and name != "training")) for module in modules)
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    state = shapes, stated, tuple(repr(vars(config)) for config in configs.values())
    known = _LAYOUTS.get(model)
    if known is None or known[0] != state:
        known = _LAYOUTS[model] = (state, _canonical_layout(find_heads(model)))
    return known[1]


def with_params(layer: AttentionLayer, rename: Callable[[str], str]) -> AttentionLayer:
    """The layer with its slices' parameters renamed."""
    heads, groups = (tuple(tuple(replace(part, param=rename(part.param)) for part in unit) for unit in units)
                     for units in (layer.heads, layer.groups))
    return replace(layer, heads=heads, groups=groups)


def _canonical_layout(layout: HeadLayout) -> HeadLayout:
    if all(canonical(name) == name for name in layout.shapes):
        return layout
    layers = tuple(replace(with_params(layer, canonical), module=canonical(layer.module),
                           output=None if layer.output is None else canonical(layer.output))
                   for layer in layout.layers)
    return replace(layout, layers=layers, shapes={canonical(name): shape for name, shape in layout.shapes.items()})
