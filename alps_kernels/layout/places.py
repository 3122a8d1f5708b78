"""What an attention module's place in the model says: self or cross, and which tower."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

_CROSS = re.compile(r"cross|encoder_attn|enc_?dec|encoder_decoder|encoder_attention|src_attn")
# The first word found in the path names the tower; modalities before stacks.
_MODALITIES = (
    ("vision", re.compile(r"vision|visual|image|vit\b|pixel|video|vqmodel|siglip|sam_model")),
    ("audio", re.compile(r"audio|speech|codec|acoustic")),
    ("text", re.compile(r"text|language|\blm\b|llm")),
    ("qformer", re.compile(r"qformer|q_former|resampler|perceiver|projector|connector")),
)
_STACKS = (("encoder", re.compile(r"encoder")), ("decoder", re.compile(r"decoder")))


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
    words = name.lower().split(".")
    for pattern_set in (_MODALITIES, _STACKS):
        for word in words:
            for tower, pattern in pattern_set:
                if pattern.search(word):
                    return tower
    return ""
