"""Which modules are attention with heads: by class name and by the roles of their children."""

from __future__ import annotations

from torch import nn


def attention_like(class_name: str) -> bool:
    return any(word in class_name.lower() for word in ("attention", "attn"))


def is_attention(module: nn.Module, roles: dict) -> bool:
    """Query, key and value (or what stands for them) are among the children."""
    has = roles.keys()
    if any(isinstance(child, nn.MultiheadAttention) for child in module.children()):
        return False  # its projections feed that module, which is the one with heads
    like = attention_like(type(module).__name__)
    if (
        "q" in has
        and has & {"kv", "kv_b"}
        or {"q", "k", "v"} <= has
        or {"q", "k_of", "v_of"} <= has
        or "qkv" in has
    ):
        return True
    return like and (
        "in" in has
        or {"q_gate", "kv_b"} <= has
        or {"qk", "v"} <= has
        or {"q", "k", "o"} <= has
        or (has & {"q", "k", "v", "o"} == {"q", "o"})
    )


def not_heads(module: nn.Module) -> bool:
    """Recurrences (no softmax over positions) and the selectors of sparse attention."""
    kind = type(module).__name__.lower()
    if any(word in kind for word in ("delta", "lightning", "mamba", "lstm", "indexer", "rwkv")):
        return True
    return any(
        mark in module._modules or mark in module._parameters for mark in ("A_log", "conv1d", "forget_gate")
    )
