"""How many heads an attention module has, and of which size: what is stated against the shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .slices import LayoutError

HEADS = (
    "num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "heads", "attention_heads",
    "encoder_attention_heads", "decoder_attention_heads",
)
HEAD_DIM = (
    "head_dim", "attention_head_size", "d_head", "dim_head", "dim_per_head", "head_size", "attn_head_size",
    "key_value_proj_dim", "qk_head_dim", "d_kv", "attention_head_dim",
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


def stated(sources: Iterable[Any], names: tuple[str, ...], least: int = 1) -> int | None:
    """The first of `names` that the nearest (first) source states as an integer of `least` or more."""
    for value in (read(source, name) for source in sources for name in names):
        if type(value) is int and value >= least:
            return value
    return None


def read(source: Any, name: str) -> Any:
    """`source.name`, or None where it is missing or (per-layer configs) refuses to say."""
    try:
        return getattr(source, name, None)
    except Exception:  # a config of unequal layers raises an error of its own for a global value
        return None


def fit(sources: Sequence[Any], *, q: int, k: int, v: int, o: int) -> tuple[Sizes, int] | None:
    """Sizes of separate projections from their output features (`o`: input features), or None.

    Args:
        sources: what states sizes: the attention module, then the module around it and the configs.

    Returns:
        the sizes, and how many times wider than heads * qk the query projection is: 1, or 2
        where it holds an output gate too.
    """
    for source in sources:
        heads, qk = stated([source], HEADS), stated([source], HEAD_DIM)
        for wide in (1, 2):
            if (heads or qk) and (sizes := _divide(heads, qk, wide, q, k, v, o)) and _agrees(sizes, sources[0]):
                return sizes, wide
    return None


def solve(module: str, sources: Sequence[Any], *, q: int, k: int, v: int, o: int) -> tuple[Sizes, int]:
    """What `fit` returns; LayoutError where no stated head size or head count fits the shapes."""
    if found := fit(sources, q=q, k=k, v=v, o=o):
        return found
    raise LayoutError(f"{module}: projections of {q} query, {k} key and {v} value features, with {o} features into the "
                      f"output projection, do not divide into heads; stated: {stated(sources, HEADS)} heads, "
                      f"head size {stated(sources, HEAD_DIM)}")


def _agrees(sizes: Sizes, module: Any) -> bool:
    """What the attention module, and its own config, state besides does not contradict `sizes`."""
    heads, groups = stated([module, read(module, "config")], HEADS), stated([module], KV_HEADS)
    ratio = read(module, "num_key_value_groups")
    if type(ratio) is int and ratio > 1 and sizes.heads != ratio * sizes.groups:
        return False  # 1 says nothing: modules without groups state it for the attention function
    return heads in (None, sizes.heads) and groups in (None, sizes.groups)


def _divide(heads: int | None, qk: int | None, wide: int, q: int, k: int, v: int, o: int) -> Sizes | None:
    """The sizes if everything divides and every equation holds, else None."""
    if heads is None:
        heads = q // (wide * qk)
    elif qk is None:
        qk = q // (wide * heads)
    if not qk or not heads or heads * qk * wide != q or not k or k % qk:
        return None
    groups = k // qk
    if heads % groups or v % groups or o * groups != heads * v:
        return None
    return Sizes(heads, groups, qk, v // groups)
