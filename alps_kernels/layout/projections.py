"""The linear maps inside an attention module: which there are and what their names say.

Reads module names, classes' attributes and weight shapes only, so it works on meta tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .layout import HeadSlice, LayoutError

# Words of a child's name that say nothing about its role.
_FILLERS = {"proj", "projection", "project", "lin", "linear", "to", "head", "layer", "weight", "self"}
_ROLES = {
    ("q",): "q",
    ("query",): "q",
    ("wq",): "q",
    ("q", "attn"): "q",
    ("q", "b"): "q",
    ("k",): "k",
    ("key",): "k",
    ("wk",): "k",
    ("v",): "v",
    ("value",): "v",
    ("wv",): "v",
    ("qkv",): "qkv",
    ("wqkv",): "qkv",
    ("query", "key", "value"): "qkv",
    ("c", "attn"): "qkv",
    ("kv",): "kv",
    ("wkv",): "kv",
    ("key", "value"): "kv",
    ("kv", "b"): "kv_b",
    ("query", "key"): "qk",
    ("in",): "in",
    ("q", "gate"): "q_gate",
    ("o", "a"): "o_a",
    # one key and value projection for every source of a cross-attention
    **{("key", source): "k_of" for source in ("protein", "structure", "msa")},
    **{("value", source): "v_of" for source in ("protein", "structure", "msa")},
}
_OUTPUTS = (("o",), ("out",), ("wo",), ("dense",), ("c",), (), ("attention", "out"), ("post",), ("output",))
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


def role_of(name: str) -> str | None:
    """The role that a child's name gives it: "q", "k", "v", "qkv", "kv", "kv_b", "o" ..., or None."""
    words = _words(name)
    return _ROLES.get(words) or ("o" if words in _OUTPUTS else None)


def output_rank(name: str) -> int:
    """Order of preference among output projections: the tellingest name first."""
    return _OUTPUTS.index(_words(name))


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in name.lower().split("_") if word and word not in _FILLERS)


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
        held = [
            f"{key} {tensor.dtype} {list(tensor.shape)}"
            for key, tensor in (*inner._parameters.items(), *inner._buffers.items())
            if tensor is not None
        ]
        raise LayoutError(
            f"{path} ({type(inner).__name__}) has no weight matrix that heads could own rows or "
            f"columns of; it holds {held or list(inner._modules)}"
        )
    weight, bias = inner._parameters["weight"], inner._parameters.get("bias")
    packed = type(weight).__module__.startswith("torchao")  # its tensors state the dtype they stand for
    if packed or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        raise LayoutError(
            f"{path} ({type(inner).__name__}): its weight is quantised or packed "
            f"({type(weight).__name__} {weight.dtype} {list(weight.shape)}); heads need "
            "floating-point weights of 16 bits or more"
        )
    n_out, n_in = weight.shape[0], weight.shape[1]
    transposed = any(kind.__name__ == "Conv1D" for kind in type(inner).__mro__)
    if transposed:
        n_out, n_in = n_in, n_out
    elif getattr(inner, "groups", 1) != 1:
        n_in = 0  # a grouped convolution: its columns are not the input's features
    return Projection(
        name, names[id(weight)], None if bias is None else names[id(bias)], n_out, n_in, transposed
    )


def bare(module: nn.Module, name: str, names: Mapping[int, str]) -> dict[str, Projection]:
    """Projections held as bare parameters, by role.

    torch's MultiheadAttention: one packed [3 d, d] or three matrices, one bias for all three.
    XLNet: [d, heads, head_dim] for each of q, k, v and o.
    """
    held = {key: param for key, param in module._parameters.items() if param is not None}
    if (packed := held.get("in_proj_weight")) is not None:
        bias = held.get("in_proj_bias")
        return {
            "qkv": Projection(
                name, names[id(packed)], None if bias is None else names[id(bias)], *packed.shape
            )
        }
    if {"q_proj_weight", "k_proj_weight", "v_proj_weight"} <= held.keys():
        bias = None if held.get("in_proj_bias") is None else names[id(held["in_proj_bias"])]
        weights = [held[f"{role}_proj_weight"] for role in "qkv"]
        return {
            role: Projection(name, names[id(w)], bias, *w.shape, bias_at=i * weights[0].shape[0])
            for i, (role, w) in enumerate(zip("qkv", weights, strict=True))
        }
    if all(role in held and held[role].ndim == 3 for role in "qkvo"):
        sizes = {role: (held[role].shape[0], held[role][0].numel()) for role in "qkvo"}
        return {
            role: Projection(
                name,
                names[id(held[role])],
                None,
                n_out=inner if role != "o" else outer,
                n_in=outer if role != "o" else inner,
                transposed=role != "o",
            )
            for role, (outer, inner) in sizes.items()
        }
    return {}


def find_projections(module: nn.Module, name: str) -> dict[str, list[tuple[str, nn.Module]]]:
    """Children of `module` by role, each as (name in the model, module); those with parameters or buffers."""
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for key, child in module._modules.items():
        if child is None or not _holds_tensors(child):
            continue
        if role := role_of(key):
            found.setdefault(role, []).append((f"{name}.{key}" if name else key, child))
    return found


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
