"""`find_heads`: locate every attention head of a model from its structure.

Walks the modules, takes those whose children are query, key and value projections (by the
children's names), checks the sizes their attributes and weights state against each other, and
refuses where anything is left open. No model class is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..tensors import check_type
from .classify import attention_like, is_attention, is_headless, kind_of, towers_of
from .head_sizes import fit, read, solve, stated
from .layout import HeadLayout
from .packed_qkv import (
    Owned, add_bare_biases, join_differential_pairs, separate, split_latent, split_packed, split_pair,
)
from .projections import Candidate, Projection
from .slices import AttentionLayer, LayoutError

_ROLES = ("q", "q_gate", "qk", "k", "v", "qkv", "kv", "kv_b", "in")


def find_heads(model: nn.Module) -> HeadLayout:
    """What every attention head of `model` owns.

    Reads names, shapes and attributes only: the model may be on the meta device. Wrappers
    (`.module`, torch.compile, PEFT adapters) are seen through; of a LoRA layer the base weight
    is what a head owns. A module or a weight used several times is one layer.

    Only attention over positions (or channels) through a softmax has heads here: recurrences
    that also speak of heads (delta rules, lightning attention, state spaces, xLSTM) are left
    out, and so is what no single head owns: biases of output projections, MLA's shared rotary
    key, the selectors of sparse attention ("indexers"), output gates with a projection of their
    own, and the extra projections of global or entity tokens (Longformer, LUKE).

    Raises:
        TypeError: it is no module.
        LayoutError: the model has no attention heads, or some that cannot be located; the
            message names the module and why.
    """
    check_type("the model", model, nn.Module, "a torch.nn.Module")
    inner = next((m for m in model.modules() if read(m, "config") is not None), model)
    config = read(inner, "config")
    model_type = read(config, "model_type") or type(inner).__name__
    found, problems = _locate_all(model, config)
    if problems:
        first, *more = problems
        raise LayoutError(first + (f" (and {len(more)} more modules)" if more else ""))
    if not found:
        raise LayoutError(f"{model_type}: no module of this model holds attention heads (query, key and value "
                          "projections); state-space models and other recurrences have none")
    towers = towers_of([layer.module for layer in found])
    layers = tuple(replace(layer, tower=tower) for layer, tower in zip(found, towers, strict=True))
    held = {part.param for layer in layers for part in layer.parts}
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters() if name in held}
    return HeadLayout(layers, shapes, model_type)


def _locate_all(model: nn.Module, config: Any) -> tuple[list[AttentionLayer], list[str]]:
    """The attention layers in order, and why other modules that look like attention were not located."""
    modules = dict(model.named_modules())
    names = {id(param): name for name, param in model.named_parameters()}
    found: list[AttentionLayer] = []
    problems: list[str] = []
    unknown: list[Candidate] = []
    taken: set[str] = set()
    for name, module in modules.items():
        if is_headless(module):
            continue
        at = Candidate(name, modules, names, config)
        if at.bare or is_attention(module, at.children):
            try:
                owned = _locate(at, found)
                shared = sorted(owned.weights & taken)
                if not shared:
                    taken |= owned.weights
                    found.append(_layer(len(found), at, owned))
                elif owned.weights - taken:
                    problems.append(f"{at}: shares {shared} but not all of its projections with another attention "
                                    "module")
            except LayoutError as error:
                problems.append(str(error))
        elif at.children.keys() - {"o", "in"} and attention_like(module):
            unknown.append(at)
    for at in unknown:
        if not any(_nested(at.name, layer.module) or _nested(layer.module, at.name) for layer in found):
            problems.append(
                f"{at}: it has projections {_named(at)}, which are not a known set of query, key, value and output"
            )
    return found, problems


def _layer(index: int, at: Candidate, owned: Owned) -> AttentionLayer:
    """The layer that a located module is, its tower still open."""
    kind = kind_of(at.name, at.module, at.parent)
    output = owned.out.module if owned.out.module != at.name else None
    return AttentionLayer(
        index, at.name, kind, "", owned.heads, owned.groups, owned.group_of, output=output, kv_layer=owned.kv_layer
    )


def _locate(at: Candidate, found: Sequence[AttentionLayer]) -> Owned:
    """The heads of one attention module, `found` those before it; LayoutError where its projections do not fit."""
    maps = {role: at.one(role) for role in _ROLES}
    q, latent = maps["q"] or maps["qk"] or maps["q_gate"], maps["kv_b"]
    keys, values = ([maps[role]] if maps[role] else at.every(f"{role}_of") for role in ("k", "v"))
    if "o_a" in at.children:
        raise LayoutError(
            f"{at}: {at.children['o_a'][0][0]} is a grouped low-rank output projection, in which heads of "
            "different groups share their columns"
        )
    if q is None:
        if (packed := maps["qkv"] or maps["in"]) is None:
            raise LayoutError(f"{at}: its projections {_named(at)} are not a known set of query, key and value")
        return add_bare_biases(at, split_packed(at, packed, at.output(lambda o: o.n_in < packed.n_out)))
    if latent is not None:
        return split_latent(at, q, q is maps["q_gate"], latent, at.output(lambda o: True))
    pair = maps["kv"] or maps["qkv"]
    keys = keys or ([maps["qk"]] if maps["qk"] else [])
    if keys or pair is not None:
        return _separate(at, q, keys, values or keys, pair)
    return _reusing(at, q, found)


def _separate(at: Candidate, q: Projection, keys: list[Projection], values: list[Projection],
              pair: Projection | None) -> Owned:
    """Separate query, and keys and values apart or packed in one tensor."""
    sources, names = at.sources, ("num_heads", "num_attention_heads", "n_heads")
    if type(at.module).__name__.endswith("AttnBlock") and stated([at.module], names) is None:
        sources = [SimpleNamespace(num_heads=1)]  # image tokenizers attend with one head and never say so
    k, v = (keys[0].n_out, values[0].n_out) if pair is None else [pair.n_out // 2] * 2
    if any(p.n_out != k for p in keys) or any(p.n_out != v for p in values):
        raise LayoutError(f"{at.name}: its key or value projections differ in size")
    out = at.output(lambda o: fit(sources, q=q.n_out, k=k, v=v, o=o.n_in) is not None)
    sizes, wide = solve(at.name, sources, q=q.n_out, k=k, v=v, o=out.n_in)
    if pair is not None:
        if wide != 1:
            raise LayoutError(f"{at.name}: its query projection is twice as wide as its heads")
        return split_pair(q, pair, out, sizes)
    owned = add_bare_biases(at, separate(q, keys, values, out, sizes, wide))
    return join_differential_pairs(owned) if "lambda_q1" in at.module._parameters else owned


def _reusing(at: Candidate, q: Projection, found: Sequence[AttentionLayer]) -> Owned:
    """A query and an output projection alone: keys and values are another layer's."""
    stack, sort = _stack(at.name), read(at.module, "layer_type")
    alike = [layer for layer in found if layer.groups and _stack(layer.module) == stack
             and read(at.modules[layer.module], "layer_type") == sort]
    source = read(at.module, "kv_shared_layer_index")
    if type(source) is int:
        alike = [layer for layer in alike if read(at.modules[layer.module], "layer_idx") == source]
    reused = alike[-1] if alike else None
    ratio, per_head = read(at.module, "num_key_value_groups") or 1, at.states("head_dim")
    k = q.n_out // per_head // ratio * per_head if per_head else 0
    out = at.output(lambda o: True)
    sizes, wide = solve(at.name, at.sources, q=q.n_out, k=k, v=k, o=out.n_in)
    if wide != 1 or (reused is not None and reused.n_groups != sizes.groups):
        raise LayoutError(f"{at.name}: its queries do not fit the keys and values it takes from another layer")
    return replace(separate(q, (), (), out, sizes, wide), kv_layer=None if reused is None else reused.index)


def _nested(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer + ".") or not outer


def _stack(name: str) -> str:
    """The path up to the first number: what the layers of one stack share."""
    words = name.split(".")
    return ".".join(words[: next((i for i, word in enumerate(words) if word.isdigit()), len(words))])


def _named(at: Candidate) -> list[str]:
    return sorted(path.rpartition(".")[2] for found in at.children.values() for path, _ in found)
