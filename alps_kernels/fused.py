"""How many heads an attention module has and which rows and columns each one owns.

The sizes come from the module's own attributes and its weights' shapes, the config last; every
equation between them must hold. The order inside fused tensors cannot be read off shapes: the
few lines that know it are `fused_order`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .layout import HeadSlice, LayoutError
from .projections import Projection

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "heads", "attention_heads",
          "encoder_attention_heads", "decoder_attention_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "num_query_groups")
_HEAD_DIM = ("head_dim", "attention_head_size", "d_head", "dim_head", "dim_per_head", "head_size", "attn_head_size",
             "key_value_proj_dim", "qk_head_dim", "d_kv", "attention_head_dim")
Units = tuple[tuple[HeadSlice, ...], ...]


@dataclass(frozen=True)
class Sizes:
    """heads, groups (key/value heads), and the sizes of one head's query/key and value."""

    heads: int
    groups: int
    qk: int
    v: int

    def group_of(self) -> tuple[int, ...]:
        return tuple(head * self.groups // self.heads for head in range(self.heads))


@dataclass(frozen=True)
class Owned:
    """What the heads of one attention module own; see `layout.AttentionLayer`."""

    heads: Units
    groups: Units
    group_of: tuple[int, ...]


class Facts:
    """Integers that a module, the modules around it and the configs state about its heads."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.sources = [source for source in sources if source is not None]

    def get(self, names: tuple[str, ...]) -> int | None:
        """The first of `names` that the nearest source states as a positive integer."""
        for source in self.sources:
            for name in names:
                value = read(source, name)
                if type(value) is int and value > 0:
                    return value
        return None


def read(source: Any, name: str) -> Any:
    """`source.name`, or None where it is missing or (per-layer configs) refuses to say."""
    try:
        return getattr(source, name, None)
    except Exception:  # a config of unequal layers raises its own error for a global value
        return None


def solve(module: str, facts: Facts, *, q: int, k: int, v: int, o: int | None) -> tuple[Sizes, int]:
    """Sizes of separate projections from their output features (`o`: input features).

    Returns:
        the sizes, and how many times wider than heads * qk the query projection is: 1, or 2
        where it holds an output gate too.

    Raises:
        LayoutError: no stated head size or head count fits the shapes.
    """
    stated = facts.get(_HEADS), facts.get(_HEAD_DIM)
    tried = []
    for source in facts.sources:
        near = Facts([source])
        for heads, qk in ((near.get(_HEADS), near.get(_HEAD_DIM)), (near.get(_HEADS), None), (None, near.get(_HEAD_DIM))):
            if (heads, qk) == (None, None) or (heads, qk) in tried:
                continue
            tried.append((heads, qk))
            for wide in (1, 2):
                if sizes := _fit(heads, qk, wide, q, k, v, o):
                    return sizes, wide
    raise LayoutError(f"{module}: projections of {q} query, {k} key, {v} value features and {o} features into the output "
                      f"projection do not divide into heads; stated: heads {stated[0]}, head size {stated[1]}")


def _fit(heads: int | None, qk: int | None, wide: int, q: int, k: int, v: int, o: int | None) -> Sizes | None:
    """The sizes if everything divides and every equation holds, else None."""
    if heads is None:
        heads = q // (wide * qk)
    elif qk is None:
        qk = q // (wide * heads)
    if heads * qk * wide != q or not qk or not heads or k % qk or not k:
        return None
    groups = k // qk
    if heads % groups or v % groups:
        return None
    if o is not None and o * groups != heads * v:
        return None
    return Sizes(heads, groups, qk, v // groups)


def output_columns(out: Projection | None, sizes: Sizes) -> Units:
    """The columns of the output projection of every head; no slices where there is none."""
    if out is None:
        return ((),) * sizes.heads
    return tuple(out.columns("o", h * sizes.v, (h + 1) * sizes.v) for h in range(sizes.heads))


def separate(q: Projection, k: Projection, v: Projection, out: Projection | None, sizes: Sizes, wide: int) -> Owned:
    """Heads of separate projections; a gated query interleaves [query, gate] per head."""
    heads, step = [], wide * sizes.qk
    for h, columns in enumerate(output_columns(out, sizes)):
        own = q.rows("q", h * step, h * step + sizes.qk)
        if wide == 2:
            own += q.rows("gate", h * step + sizes.qk, (h + 1) * step)
        heads.append(own + columns)
    groups = tuple(k.rows("k", g * sizes.qk, (g + 1) * sizes.qk) + v.rows("v", g * sizes.v, (g + 1) * sizes.v)
                   for g in range(sizes.groups))
    return Owned(tuple(heads), groups, sizes.group_of())


def fused_order(core: nn.Module, name: str) -> str:
    """How q, k and v lie in a fused tensor.

    "blocks": all of q, then all of k, then all of v. "heads": q, k, v of the first head, then of
    the second ... "groups": the queries of a key/value group, its key, its value, then the next
    group. "codegen": four blocks of (q, v, k).
    """
    kind = type(core).__name__
    if kind.startswith("CodeGen"):
        return "codegen"
    if read(core, "new_decoder_architecture") is True:
        return "groups"
    multi_query = read(core, "multi_query")
    if multi_query is not None:
        return "blocks" if multi_query else "heads"
    if name.endswith("query_key_value") or name.endswith("in_proj"):
        return "heads"
    return "blocks"


def split_fused(module: str, core: nn.Module, fused: Projection, out: Projection | None, facts: Facts) -> Owned:
    """Heads of one tensor that holds q, k and v.

    Raises:
        LayoutError: the stated sizes do not add up to the tensor's rows.
    """
    order = fused_order(core, fused.module.removesuffix(".base_layer"))
    sizes = _fused_sizes(module, core, fused, out, facts, order)
    n, g, d = sizes.heads, sizes.groups, sizes.qk
    per = n // g
    if order == "blocks":
        q = [h * d for h in range(n)]
        k = [(n + i) * d for i in range(g)]
        v = [(n + g + i) * d for i in range(g)]
    elif order == "heads":
        q, k, v = ([(3 * h + j) * d for h in range(n)] for j in range(3))
    elif order == "groups":
        q = [(h // per * (per + 2) + h % per) * d for h in range(n)]
        k = [(i * (per + 2) + per) * d for i in range(g)]
        v = [(i * (per + 2) + per + 1) * d for i in range(g)]
    else:
        local = n // 4  # heads per block; a block is its heads' q, then v, then k
        at = [(h // local * 3 * local + h % local) * d for h in range(n)]
        q, v, k = at, [x + local * d for x in at], [x + 2 * local * d for x in at]
    heads = tuple(fused.rows("q", q[h], q[h] + d) + columns for h, columns in enumerate(output_columns(out, sizes)))
    groups = tuple(fused.rows("k", k[i], k[i] + d) + fused.rows("v", v[i], v[i] + d) for i in range(g))
    return Owned(heads, groups, sizes.group_of())


def _fused_sizes(module: str, core: nn.Module, fused: Projection, out: Projection | None, facts: Facts,
                 order: str) -> Sizes:
    heads, rows = facts.get(_HEADS), fused.n_out
    if heads is None:
        raise LayoutError(f"{module}: nothing states how many heads the {rows} fused features hold")
    width = out.n_in if out is not None and out.n_in else rows // 3
    head_dim = width // heads
    groups, rest = divmod(rows - heads * head_dim, 2 * head_dim) if head_dim else (0, 1)
    fits = heads * head_dim == width and not rest and groups and heads % groups == 0
    if not fits or (order in ("heads", "codegen") and groups != heads) or (order == "codegen" and heads % 4):
        raise LayoutError(f"{module}: {rows} fused features do not divide into q, k and v of {heads} heads of size "
                          f"{head_dim} ({width} features enter the output projection)")
    return Sizes(heads, groups, head_dim, head_dim)


def split_pair(q: Projection, kv: Projection, out: Projection | None, sizes: Sizes) -> Owned:
    """Heads of a query projection and one tensor that holds all keys, then all values."""
    k_rows = sizes.groups * sizes.qk
    heads = tuple(q.rows("q", h * sizes.qk, (h + 1) * sizes.qk) + columns
                  for h, columns in enumerate(output_columns(out, sizes)))
    groups = tuple(kv.rows("k", g * sizes.qk, (g + 1) * sizes.qk)
                   + kv.rows("v", k_rows + g * sizes.v, k_rows + (g + 1) * sizes.v) for g in range(sizes.groups))
    return Owned(heads, groups, sizes.group_of())


def split_latent(module: str, q: Projection, kv_b: Projection, out: Projection, facts: Facts) -> Owned:
    """Heads of multi-head latent attention: rows of q_b per head [nope, rope], of kv_b [k, v].

    The rotary key is one for all heads and belongs to none.

    Raises:
        LayoutError: the stated sizes do not add up to the weights' shapes.
    """
    heads, nope, rope, v = (facts.get(n) for n in (_HEADS, ("qk_nope_head_dim",), ("qk_rope_head_dim",), ("v_head_dim",)))
    rope = rope or 0
    if not (heads and nope and v) or (q.n_out, kv_b.n_out, out.n_in) != (heads * (nope + rope), heads * (nope + v), heads * v):
        raise LayoutError(f"{module}: latent attention of {q.n_out} query, {kv_b.n_out} key/value and {out.n_in} output "
                          f"features does not divide into {heads} heads of {nope} + {rope} and {v}")
    units, groups = [], []
    for h, columns in enumerate(output_columns(out, Sizes(heads, heads, nope, v))):
        at, kv_at = h * (nope + rope), h * (nope + v)
        own = q.rows("q", at, at + nope) + (q.rows("q_rope", at + nope, at + nope + rope) if rope else ())
        units.append(own + columns)
        groups.append(kv_b.rows("k", kv_at, kv_at + nope) + kv_b.rows("v", kv_at + nope, kv_at + nope + v))
    return Owned(tuple(units), tuple(groups), tuple(range(heads)))
