"""Which modules hold the trained slices, and whether slices of them can train."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

from ..layout import LayoutError
from ..selection import BoundParam, BoundSelection
from .projection import PRODUCTS

_HARMLESS = {"dtype", "device", "shape", "size", "ndim", "numel", "requires_grad", "is_cuda", "is_meta"}


class Place(NamedTuple):
    """One projection to slice, and what of its parameters trains."""

    module: nn.Module
    parts: dict[str, BoundParam]  # by "weight" and "bias", in this order


def find_places(model: nn.Module, bound: BoundSelection) -> list[Place]:
    """The projections that hold partly trained parameters; LayoutError where one of them cannot be sliced."""
    trained = {id(part.param): part for part in bound.params}
    modules, owners = dict(model.named_modules()), defaultdict(list)
    for path, module in modules.items():
        for key, param in module._parameters.items():
            owners[id(param)].append(f"{path}.{key}")
    places = []
    for path, module in modules.items():
        parts = {key: trained[id(param)] for key, param in module._parameters.items() if id(param) in trained}
        partial = {key: part for key, part in parts.items() if not part.full}
        for key, part in partial.items():
            if others := owners[id(part.param)][1:]:
                raise LayoutError(f"{part.name} is tied to {others[0]}: its slices cannot train in one place alone; "
                                  "untie them first")
            _check_module(path, module, key, modules.get(path.rpartition(".")[0]) if path else None)
            _check_param(part)
        if partial:  # beside a cut weight or bias the other one's leaf is all of it
            places.append(Place(module, {key: parts[key] for key in ("weight", "bias") if key in parts}))
    return places


def product_of(plain_class: type[nn.Module]) -> str | None:
    """How a projection's class multiplies; None where it has another forward than those that are repeated here."""
    home = next(cls for cls in plain_class.__mro__ if "forward" in vars(cls))
    return PRODUCTS.get((home.__module__, home.__qualname__))


def _check_module(path: str, module: nn.Module, key: str, parent: nn.Module | None) -> None:
    """Raises LayoutError where the module is not a projection with the plain forward."""
    kind = type(module)
    plain = getattr(kind, "plain_class", kind)
    named = f"{path or 'the model'} ({plain.__name__})"
    if key not in ("weight", "bias") or not (issubclass(plain, nn.Linear) or plain.__name__ == "Conv1D"):
        raise LayoutError(f"{named} holds selected heads in {key} and is neither an nn.Linear nor a transformers "
                          "Conv1D; only those can be sliced")
    if product_of(plain) is None or "forward" in module.__dict__:
        raise LayoutError(f"{named} has a forward of its own (an adapter, a quantised layer or a hook around it), past "
                          "which its slices would have no gradient; slice the plain model")
    if isinstance(parent, nn.MultiheadAttention):
        raise LayoutError(f"{named} is part of an nn.MultiheadAttention, which uses its weight and never calls it; "
                          "only projections that are called can be sliced")
    if parent is not None and getattr(parent, "base_layer", None) is module:
        raise LayoutError(f"{named} is wrapped by {type(parent).__name__}; take the adapter off or merge it first")
    if parent is not None and f"{path.rpartition('.')[2]}.{key}" in _read_directly(type(parent)):
        raise LayoutError(f"{named}: {type(parent).__name__} multiplies with its {key} itself instead of calling it, "
                          "and its slices would have no gradient there")


@functools.cache
def _read_directly(parent: type[nn.Module]) -> frozenset[str]:
    """The "child.weight" and "child.bias" whose values the class's methods read, as its source says."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(parent)))
    except (OSError, TypeError, SyntaxError):  # made at run time: nothing to read
        return frozenset()
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "init" not in node.name]
    asked = {id(node.value) for method in methods for node in ast.walk(method)
             if isinstance(node, ast.Attribute) and node.attr in _HARMLESS}
    asked |= {id(node.left) for method in methods for node in ast.walk(method)
              if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot))}
    return frozenset(
        f"{node.value.attr}.{node.attr}" for method in methods for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and id(node) not in asked
        and isinstance(node.value, ast.Attribute) and getattr(node.value.value, "id", None) == "self")


def _check_param(part: BoundParam) -> None:
    param = part.param
    if type(param) is not nn.Parameter or param.layout != torch.strided:
        raise LayoutError(f"{part.name} is a {type(param).__name__} ({param.layout}); expected a plain parameter: "
                          "slice the model before it is sharded or quantised")
    if param.is_inference() or torch.is_inference_mode_enabled():
        raise LayoutError(f"{part.name}: a model that lives in inference mode cannot train; slice it outside of it")
