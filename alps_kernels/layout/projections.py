"""The linear maps inside an attention module, and where they stand in the model.

Reads module names, classes' attributes and weight shapes only, so it works on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .classify import attention_like, output_rank, role_of
from .head_sizes import read, stated
from .slices import HeadSlice, LayoutError

_WRAPPED = ("base_layer", "linear")


@dataclass(frozen=True)
class Projection:
    """One linear map y = W x (+ b) of an attention module.

    Attributes:
        module: name of the module that is called (a wrapper such as a LoRA layer included).
        weight, bias: parameter names; `bias` is None where there is none.
        n_out, n_in: features.
        transposed: the weight is stored [n_in, n_out] (transformers' Conv1D).
        bias_at: where in the bias parameter this map's own begins.
    """

    module: str
    weight: str
    bias: str | None
    n_out: int
    n_in: int
    transposed: bool = False
    bias_at: int = 0

    def rows(self, role: str, start: int, stop: int) -> tuple[HeadSlice, ...]:
        """Output features [start, stop) as slices of the weight and of the bias, if any."""
        weight = HeadSlice(self.weight, role, 1 if self.transposed else 0, start, stop)
        if self.bias is None:
            return (weight,)
        return weight, HeadSlice(self.bias, role, 0, self.bias_at + start, self.bias_at + stop, bias=True)

    def columns(self, role: str, start: int, stop: int) -> tuple[HeadSlice, ...]:
        """Input features [start, stop) as a slice of the weight; the bias belongs to no input."""
        return (HeadSlice(self.weight, role, 0 if self.transposed else 1, start, stop),)


def is_linear(module: nn.Module) -> bool:
    """Has a weight matrix of one row per output feature: Linear, Conv1D, a convolution of kernel 1."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or isinstance(module, nn.Embedding):
        return False
    return weight.ndim == 2 or torch.Size(weight.shape[2:]).numel() == 1


def unwrap(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The linear map inside adapters (`base_layer`), clipping wrappers (`linear`) and Sequentials."""
    while not is_linear(module):
        inner = [key for key in _WRAPPED if isinstance(module._modules.get(key), nn.Module)]
        if not inner and isinstance(module, nn.Sequential):
            inner = [key for key, child in module._modules.items() if any(True for _ in child.parameters())]
        if len(inner) != 1:
            break
        module, name = module._modules[inner[0]], f"{name}.{inner[0]}"
    return module, name


def projection(module: nn.Module, name: str, names: Mapping[int, str]) -> Projection:
    """The linear map that a child of an attention module is.

    Args:
        module, name: the child and its name in the model.
        names: parameter names by `id`, from `model.named_parameters()`.

    Raises:
        LayoutError: it is none, or its weight is packed or quantised.
    """
    inner, path = unwrap(module, name)
    if not is_linear(inner):
        held = [f"{key} {tensor.dtype} {list(tensor.shape)}"
                for key, tensor in (*inner._parameters.items(), *inner._buffers.items()) if tensor is not None]
        raise LayoutError(f"{path} ({type(inner).__name__}) has no weight matrix that heads could own rows or "
                          f"columns of; it holds {held or list(inner._modules)}")
    weight, bias = inner._parameters["weight"], inner._parameters.get("bias")
    packed = type(weight).__module__.startswith("torchao")  # its tensors state the dtype they stand for
    if packed or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise LayoutError(f"{path} ({type(inner).__name__}): its weight is quantised or packed "
                          f"({type(weight).__name__} {weight.dtype} {list(weight.shape)}); heads need "
                          "floating-point weights of 16 bits or more")
    n_out, n_in = weight.shape[0], weight.shape[1]
    transposed = any(kind.__name__ == "Conv1D" for kind in type(inner).__mro__)
    if transposed:
        n_out, n_in = n_in, n_out
    elif getattr(inner, "groups", 1) != 1:
        n_in = 0  # a grouped convolution: its columns are not the input's features
    return Projection(name, names[id(weight)], None if bias is None else names[id(bias)], n_out, n_in, transposed)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module that may be attention, where it stands in the model, and the linear maps in it.

    Attributes:
        name: its name in `modules`.
        modules: all of the model, `model.named_modules()`.
        names: all parameter names by `id`, from `model.named_parameters()`.
        config: the model's.
    """

    name: str
    modules: Mapping[str, nn.Module]
    names: Mapping[int, str]
    config: Any

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    @property
    def module(self) -> nn.Module:
        return self.modules[self.name]

    @property
    def parent(self) -> nn.Module | None:
        """The module around it, None for the model itself."""
        return self.modules.get(self.name.rpartition(".")[0]) if self.name else None

    @cached_property
    def sources(self) -> list[Any]:
        """What states sizes: the module, the module around it and the configs, the nearest first."""
        return [self.module, self.parent, read(self.module, "config"), self.config]

    def states(self, *names: str, least: int = 1) -> int | None:
        """The size that the nearest of its `sources` states by one of these names."""
        return stated(self.sources, names, least)

    @cached_property
    def children(self) -> dict[str, list[tuple[str, nn.Module]]]:
        """The children by role, each as (name in the model, module); those with parameters or buffers."""
        found: dict[str, list[tuple[str, nn.Module]]] = {}
        for path, key, child in _children(self.module, self.name):
            if (role := role_of(key)) and (_any(child.parameters()) or _any(child.buffers())):
                found.setdefault(role, []).append((path, child))
        return found

    @cached_property
    def bare(self) -> dict[str, Projection]:
        """Projections held as bare parameters, by role.

        torch's MultiheadAttention: one packed [3 d, d] or three matrices, one bias for all three.
        XLNet: [d, heads, head_dim] for each of q, k, v and o.
        """
        held = {key: param for key, param in self.module._parameters.items() if param is not None}
        bias = self.names[id(held["in_proj_bias"])] if "in_proj_bias" in held else None
        weights = {role: held[key] for role in "qkv" if (key := f"{role}_proj_weight") in held}

        def linear(weight: nn.Parameter, n_out: int, n_in: int, **more: Any) -> Projection:
            return Projection(self.name, self.names[id(weight)], n_out=n_out, n_in=n_in, **more)

        if (packed := held.get("in_proj_weight")) is not None:
            return {"qkv": linear(packed, *packed.shape, bias=bias)}
        if len(weights) == 3:
            step = weights["q"].shape[0]
            return {r: linear(w, *w.shape, bias=bias, bias_at=i * step) for i, (r, w) in enumerate(weights.items())}
        if any(role not in held or held[role].ndim != 3 for role in "qkvo"):
            return {}
        folded = {role: (held[role].shape[0], held[role].shape[1:].numel()) for role in "qkvo"}
        maps = {r: linear(held[r], inner, outer, bias=None, transposed=True) for r, (outer, inner) in folded.items()}
        return maps | {"o": linear(held["o"], *folded["o"], bias=None)}

    def one(self, role: str) -> Projection | None:
        """The projection of a role, None where it has none.

        Raises:
            LayoutError: several children have that role, or the one has no weight matrix.
        """
        if role in self.bare:
            return self.bare[role]
        found = self.children.get(role, [])
        if len(found) > 1:
            raise LayoutError(f"{found[0][0]} and {found[1][0]} both look like the {role} projection of one module")
        return projection(found[0][1], found[0][0], self.names) if found else None

    def every(self, role: str) -> list[Projection]:
        """The projections of all children of a role."""
        return [projection(child, path, self.names) for path, child in self.children.get(role, ())]

    def output(self, fits: Callable[[Projection], bool]) -> Projection:
        """The output projection: a child, a child's child, or beside the module in its attention block.

        Args:
            fits: whether a candidate's input divides into the module's heads.

        Raises:
            LayoutError: there is no such child, or none that fits the heads.
        """
        if "o" in self.bare:
            return self.bare["o"]
        found = self._outputs_in(self.module, self.name)
        if not found and self.parent is not None:
            found = self._outputs_in(self.parent, self.name.rpartition(".")[0])
        if not found:
            raise LayoutError(f"{self}: no output projection was found, so what its heads write is unknown")
        for out in found:
            if fits(out):
                return out
        raise LayoutError(f"{self}: its output projection {found[0].module} takes {found[0].n_in} features, "
                          "which do not divide into its heads")

    def _outputs_in(self, module: nn.Module, name: str) -> list[Projection]:
        """Output projections among the children of `module`, the best named first."""
        inside = module is self.module or attention_like(module)
        ranked = []
        for path, key, child in _children(module, name):
            if child is self.module or not _any(child.parameters()):
                continue
            if inside and role_of(key) == "o":
                deeper = [] if hasattr(unwrap(child, path)[0], "weight") else [
                    (output_rank(sub), below, part) for below, sub, part in _children(child, path)
                    if role_of(sub) == "o" and _any(part.parameters())
                ]
                ranked += deeper or [(output_rank(key), path, child)]
            elif not inside and key == "post_attention":  # an attention module without a block of its own
                ranked += [(0, below, part) for below, sub, part in _children(child, path) if sub == "conv1d"]
        ranked.sort(key=lambda item: item[0])
        return [projection(part, path, self.names) for _, path, part in ranked]


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the model, own name, module) of every child of the module called `name`."""
    for key, child in module._modules.items():
        if child is not None:
            yield f"{name}.{key}" if name else key, key, child


def _any(tensors: Iterator[torch.Tensor]) -> bool:
    return next(tensors, None) is not None
