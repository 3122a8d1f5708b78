"""Classify modules by their names: attention or not, the role of each child, self or cross, and the tower."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

# Words of a child's name that say nothing about its role.
_FILLERS = {"proj", "projection", "project", "lin", "linear", "to", "head", "layer", "weight", "self"}
# The role of a child: its name without those words.
_NAMES = {
    "q": ("q", "query", "wq", "q_attn", "q_b"),
    "k": ("k", "key", "wk"),
    "v": ("v", "value", "wv"),
    "qkv": ("qkv", "wqkv", "query_key_value", "c_attn"),
    "kv": ("kv", "wkv", "key_value"),
    "kv_b": ("kv_b",),
    "qk": ("query_key",),
    "in": ("in",),
    "q_gate": ("q_gate",),
    "o_a": ("o_a",),
    # one key and value projection for every source of a cross-attention
    "k_of": ("key_protein", "key_structure", "key_msa"),
    "v_of": ("value_protein", "value_structure", "value_msa"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_OUTPUTS = ("o", "out", "wo", "dense", "c", "", "attention_out", "post", "output")  # the tellingest first

# Recurrences (no softmax over positions) and the selectors of sparse attention.
_HEADLESS = ("delta", "lightning", "mamba", "lstm", "indexer", "rwkv")
_HEADLESS_CHILDREN = ("A_log", "conv1d", "forget_gate")

_CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|encoder_attention|src_attn")
# The first word found in the path names the tower; modalities before stacks.
_MODALITIES = (
    ("vision", re.compile(r"vision|visual|image|vit\b|pixel|video|vqmodel|siglip|sam_model")),
    ("audio", re.compile(r"audio|speech|codec|acoustic")),
    ("text", re.compile(r"text|language|\blm\b|llm")),
    ("qformer", re.compile(r"qformer|q_former|resampler|perceiver|projector|connector")),
)
_STACKS = (("encoder", re.compile(r"encoder")), ("decoder", re.compile(r"decoder")))


def role_of(name: str) -> str | None:
    """The role that a child's name gives it: "q", "k", "v", "qkv", "kv", "kv_b", "o" ..., or None."""
    bare = _bare(name)
    return _ROLES.get(bare) or ("o" if bare in _OUTPUTS else None)


def output_rank(name: str) -> int:
    """Order of preference among output projections: the tellingest name first."""
    return _OUTPUTS.index(_bare(name))


def _bare(name: str) -> str:
    return "_".join(word for word in name.lower().split("_") if word and word not in _FILLERS)


def attention_like(module: nn.Module) -> bool:
    """Whether the name of the class says attention."""
    return any(word in type(module).__name__.lower() for word in ("attention", "attn"))


def is_headless(module: nn.Module) -> bool:
    """Whether it is a recurrence or a selector, which speak of heads too, or holds other modules in a list."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    return any(word in type(module).__name__.lower() for word in _HEADLESS) or any(
        mark in module._modules or mark in module._parameters for mark in _HEADLESS_CHILDREN
    )


def is_attention(module: nn.Module, roles: Collection[str]) -> bool:
    """Whether query, key and value (or what stands for them) are among the roles of its children."""
    if any(isinstance(child, nn.MultiheadAttention) for child in module.children()):
        return False  # its projections feed that module, which is the one with heads
    has = set(roles)
    whole = [{"q", "kv"}, {"q", "kv_b"}, {"q", "k", "v"}, {"q", "k_of", "v_of"}, {"qkv"}]
    if any(needed <= has for needed in whole):
        return True
    named = [{"in"}, {"q_gate", "kv_b"}, {"qk", "v"}, {"q", "k", "o"}]  # enough where the class says attention
    reusing = has & {"q", "k", "v", "o"} == {"q", "o"}  # keys and values of another layer
    return attention_like(module) and (reusing or any(needed <= has for needed in named))


def kind_of(name: str, module: nn.Module, parent: nn.Module | None) -> str:
    """ "cross" where the name, the class or an attribute says so, else "self"."""
    classes = type(module).__name__ + (f".{type(parent).__name__}" if parent is not None else "")
    path = ".".join(name.split(".")[-3:]).lower()
    if re.search(_CROSS, path) or re.search(_CROSS, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", classes).lower()):
        return "cross"
    return "cross" if getattr(module, "is_cross_attention", False) is True else "self"


def towers_of(names: Sequence[str]) -> list[str]:
    """The tower of each attention module: "" everywhere in a model of one stack."""
    found = [_tower(name) for name in names]
    if len(set(found)) == 1:
        return [""] * len(found)
    modal = any(tower in {"vision", "audio"} for tower in found)
    return [tower or ("text" if modal else "") for tower in found]


def _tower(name: str) -> str:
    found = (tower for towers in (_MODALITIES, _STACKS) for word in name.lower().split(".")
             for tower, pattern in towers if pattern.search(word))
    return next(found, "")
