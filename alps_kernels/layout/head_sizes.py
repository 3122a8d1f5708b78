"""How many heads an attention module has, and of which size: what is stated against the shapes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .layout import LayoutError

HEADS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_q_heads",
    "heads",
    "attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
HEAD_DIM = (
    "head_dim",
    "attention_head_size",
    "d_head",
    "dim_head",
    "dim_per_head",
    "head_size",
    "attn_head_size",
    "key_value_proj_dim",
    "qk_head_dim",
    "d_kv",
    "attention_head_dim",
)
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Sizes:
    """heads, groups (key/value heads), and the sizes of one head's query/key and value."""

    heads: int
    groups: int
    qk: int
    v: int

    def group_of(self) -> tuple[int, ...]:
        """For every query head its group: consecutive heads share one."""
        return tuple(head * self.groups // self.heads for head in range(self.heads))


class Facts:
    """Integers that a module, the module around it and the configs state, the nearest first."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.sources = [source for source in sources if source is not None]

    def get(self, names: tuple[str, ...], least: int = 1) -> int | None:
        """The first of `names` that the nearest source states as an integer of `least` or more."""
        for source in self.sources:
            for name in names:
                value = read(source, name)
                if type(value) is int and value >= least:
                    return value
        return None


def read(source: Any, name: str) -> Any:
    """`source.name`, or None where it is missing or (per-layer configs) refuses to say."""
    try:
        return getattr(source, name, None)
    except Exception:  # a config of unequal layers raises an error of its own for a global value
        return None


def solve(module: str, facts: Facts, *, q: int, k: int, v: int, o: int | None) -> tuple[Sizes, int]:
    """Sizes of separate projections from their output features (`o`: input features).

    Returns:
        the sizes, and how many times wider than heads * qk the query projection is: 1, or 2
        where it holds an output gate too.

    Raises:
        LayoutError: no stated head size or head count fits the shapes.
    """
    for source in facts.sources:
        near = Facts([source])
        heads, qk = near.get(HEADS), near.get(HEAD_DIM)
        for wide in (1, 2):
            if (heads or qk) and (sizes := _fit(heads, qk, wide, q, k, v, o)) and _agrees(sizes, facts):
                return sizes, wide
    raise LayoutError(
        f"{module}: projections of {q} query, {k} key and {v} value features, with {o} features into the "
        f"output projection, do not divide into heads; stated: {facts.get(HEADS)} heads, head size "
        f"{facts.get(HEAD_DIM)}"
    )


def _agrees(sizes: Sizes, facts: Facts) -> bool:
    """What the attention module, and its own config, state besides does not contradict `sizes`."""
    module = facts.sources[0]
    own = Facts([module, read(module, "config")])
    ratio = read(module, "num_key_value_groups")
    if type(ratio) is int and ratio > 1 and sizes.heads != ratio * sizes.groups:
        return False  # 1 says nothing: modules without groups state it for the attention function
    return (own.get(HEADS) in (None, sizes.heads)) and Facts([module]).get(KV_HEADS) in (None, sizes.groups)


def _fit(heads: int | None, qk: int | None, wide: int, q: int, k: int, v: int, o: int | None) -> Sizes | None:
    """The sizes if everything divides and every equation holds, else None."""
    if heads is None:
        heads = q // (wide * qk)
    elif qk is None:
        qk = q // (wide * heads)
    if not qk or not heads or heads * qk * wide != q or not k or k % qk:
        return None
    groups = k // qk
    if heads % groups or v % groups or (o is not None and o * groups != heads * v):
        return None
    return Sizes(heads, groups, qk, v // groups)
