"""Where the weights of a scored model come from, and how two models' attention layers pair up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..layout import AttentionLayer, HeadLayout, HeadSlice, LayoutError, find_heads
from ..tensors import sync_weights

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Weights(Protocol):
    """A model's attention weights, in memory or in files.

    Attributes:
        name: what to call it in messages and provenance.
        layout: its attention heads.
        model_type: its config's, None where it has no config.
        in_memory: reading costs nothing.
    """

    name: str
    layout: HeadLayout
    model_type: str | None
    in_memory: bool

    def prepare(self, params: Iterable[str]) -> None:
        """Check that these parameters can be read; nothing is read yet."""

    def read(self, params: Iterable[str]) -> dict[str, Tensor]:
        """The parameters by name, each of its shape in `layout.shapes`."""


class ModelWeights:
    """The weights of a model in memory.

    Raises:
        LayoutError: its heads cannot be located, or adapters are still beside its weights.
    """

    in_memory = True

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        config = next((c for m in model.modules() if (c := getattr(m, "config", None)) is not None), None)
        self.model_type = getattr(config, "model_type", None)
        self.name = name or os.path.basename(str(getattr(config, "name_or_path", "") or "")) or type(model).__name__
        self.layout = find_heads(model)
        sync_weights(model)
        self._params = {key: param.detach() for key, param in model.named_parameters()}
        if wrapped := [key for key in self.layout.shapes if ".base_layer." in key]:
            raise LayoutError(f"{self.name}: {wrapped[0]} has an adapter beside it, which its weight does not show; "
                              "merge the adapters first (merge_and_unload)")

    def replace(self, params: Mapping[str, Tensor]) -> None:
        """Take these values instead of the model's own, which is not touched."""
        if strange := [key for key, value in params.items() if self.layout.shapes.get(key) != tuple(value.shape)]:
            raise ValueError(f"{self.name}: {strange[0]} is no attention weight, or not of shape {list(params[strange[0]].shape)}")
        self._params.update(params)

    def prepare(self, params: Iterable[str]) -> None:
        for key in params:
            param = self._params[key]
            if param.is_meta:
                raise ValueError(f"{self.name}: {key} is on the meta device and has no values; load the model, "
                                 "or give its checkpoint folder instead")
            if param.dtype not in FLOATS:
                raise ValueError(f"{self.name}: {key} has dtype {param.dtype}; expected floating point of 16 bits or more")

    def read(self, params: Iterable[str]) -> dict[str, Tensor]:
        return {key: self._params[key] for key in params}


def match_layers(base: Weights, task: Weights) -> Callable[[str], str]:
    """Match the attention layers of two models by name.

    The modules' names must be equal, or equal after one prefix of each model is cut off (models
    with different head modules: `encoder.layer.0...` against `bert.encoder.layer.0...`).

    Returns:
        a function from a parameter name of `base` to the one of `task`.

    Raises:
        LayoutError: they are not of one architecture; it names the first difference.
    """
    if None not in (base.model_type, task.model_type) and base.model_type != task.model_type:
        raise LayoutError(f"{base.name} is a {base.model_type} and {task.name} a {task.model_type}: "
                          "scores compare two models of one architecture")
    ours, theirs = base.layout.layers, task.layout.layers
    if len(ours) != len(theirs):
        raise LayoutError(f"{base.name} has {len(ours)} attention layers and {task.name} {len(theirs)}: "
                          "scores compare two models of one architecture")
    cut, put = prefixes(ours[0].module, theirs[0].module)

    def rename(name: str) -> str:
        if not name.startswith(cut):
            raise LayoutError(f"{name} of {base.name} does not begin with {cut!r}, as the other attention weights do; "
                              f"cannot tell which weight of {task.name} it is")
        return put + name[len(cut):]

    for mine, other in zip(ours, theirs, strict=True):
        if not mine.module.startswith(cut) or rename(mine.module) != other.module:
            raise LayoutError(f"cannot tell which attention layer of {task.name} is {mine.module} of {base.name}: "
                              f"{ours[0].module} goes with {theirs[0].module}, but next is {other.module}")
        _check_pair(base, mine, task, other, rename)
    return rename


def prefixes(ours: str, theirs: str) -> tuple[str, str]:
    """What is left of two dotted names before their longest common tail; "" or ends in a dot."""
    a, b = ours.split("."), theirs.split(".")
    common = 0
    while common < min(len(a), len(b)) and a[-1 - common] == b[-1 - common]:
        common += 1
    heads = (".".join(words[:len(words) - common]) for words in (a, b))
    cut, put = (head + "." if head else "" for head in heads)
    return cut, put


def _check_pair(base: Weights, mine: AttentionLayer, task: Weights, other: AttentionLayer,
                rename: Callable[[str], str]) -> None:
    for what, ours, theirs in (("query heads", mine.n_heads, other.n_heads),
                               ("key/value groups", mine.n_groups, other.n_groups)):
        if ours != theirs:
            raise LayoutError(f"{mine.module}: {base.name} has {ours} {what}, {task.name} has {theirs}")
    for name in sorted({part.param for unit in (*mine.heads, *mine.groups) for part in unit}):
        ours, theirs = base.layout.shapes[name], task.layout.shapes.get(rename(name))
        if theirs is None:
            raise LayoutError(f"{task.name} has no {rename(name)}, which goes with {name} of {base.name}")
        if ours != theirs:
            raise LayoutError(f"{name} is {list(ours)} in {base.name} and {list(theirs)} in {task.name}")

    def places(unit: tuple[HeadSlice, ...], to_task: bool) -> list[tuple]:
        return [(rename(p.param) if to_task else p.param, p.role, p.dim, p.start, p.stop) for p in unit]

    same = all(places(a, True) == places(b, False) for ours, theirs in ((mine.heads, other.heads), (mine.groups, other.groups))
               for a, b in zip(ours, theirs, strict=True))
    if not same or mine.group_of != other.group_of or mine.kv_layer != other.kv_layer:
        raise LayoutError(f"{mine.module}: the heads of {base.name} and {task.name} lie differently in its weights")
