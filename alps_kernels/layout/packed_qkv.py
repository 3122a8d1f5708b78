"""Which rows and columns each head of an attention module owns.

The sizes come from the module's own attributes and its weights' shapes, the config last; every
equation between them must hold. The order inside fused tensors cannot be read off shapes: the
few lines that know it are `fused_order` and the two docstrings that name an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from .head_sizes import HEADS, Facts, Sizes, read
from .layout import HeadSlice, LayoutError
from .projections import Projection

Units = tuple[tuple[HeadSlice, ...], ...]


@dataclass(frozen=True)
class Owned:
    """What the heads of one attention module own; see `layout.AttentionLayer`."""

    heads: Units
    groups: Units
    group_of: tuple[int, ...]


def output_columns(out: Projection | None, sizes: Sizes) -> Units:
    """The columns of the output projection of every head; no slices where there is none."""
    if out is None:
        return ((),) * sizes.heads
    return tuple(out.columns("o", h * sizes.v, (h + 1) * sizes.v) for h in range(sizes.heads))


def blocks(proj: Projection, role: str, count: int, size: int, *, first: int = 0, step: int = 0) -> Units:
    """`count` blocks of `size` rows, the i-th at first + i * step (default: one behind the other)."""
    starts = [first + i * (step or size) for i in range(count)]
    return tuple(proj.rows(role, start, start + size) for start in starts)


def join(*parts: Units) -> Units:
    """Head by head (or group by group), the slices of all `parts`."""
    return tuple(sum(unit, ()) for unit in zip(*parts, strict=True))


def separate(
    q: Projection,
    keys: Sequence[Projection],
    values: Sequence[Projection],
    out: Projection | None,
    sizes: Sizes,
    wide: int,
) -> Owned:
    """Heads of separate projections.

    A query twice as wide interleaves [query, gate] per head. There is one key and one value
    projection for every source that is attended to, mostly one; where the value projection is
    the key projection, its rows appear in both roles.
    """
    heads = blocks(q, "q", sizes.heads, sizes.qk, step=wide * sizes.qk)
    if wide == 2:
        heads = join(heads, blocks(q, "gate", sizes.heads, sizes.qk, first=sizes.qk, step=2 * sizes.qk))
    groups = join(
        *(blocks(k, "k", sizes.groups, sizes.qk) for k in keys),
        *(blocks(v, "v", sizes.groups, sizes.v) for v in values),
    )
    return Owned(join(heads, output_columns(out, sizes)), groups, sizes.group_of())


def queries_only(q: Projection, out: Projection | None, sizes: Sizes) -> Owned:
    """Heads of a layer that attends to another layer's keys and values."""
    return Owned(
        join(blocks(q, "q", sizes.heads, sizes.qk), output_columns(out, sizes)), (), sizes.group_of()
    )


def fused_order(core: nn.Module, name: str) -> str:
    """How q, k and v lie in a fused tensor.

    "blocks": all of q, then all of k, then all of v. "heads": q, k, v of the first head, then of
    the second ... "groups": the queries of a key/value group, its key, its value, then the next
    group. "codegen": four blocks of (q, v, k).
    """
    if type(core).__name__.startswith("CodeGen"):
        return "codegen"
    if read(core, "new_decoder_architecture") is True:
        return "groups"
    multi_query = read(core, "multi_query")
    if multi_query is not None:
        return "blocks" if multi_query else "heads"
    return "heads" if name.rpartition(".")[2] in ("query_key_value", "in_proj") else "blocks"


def split_fused(
    module: str, core: nn.Module, fused: Projection, out: Projection | None, facts: Facts
) -> Owned:
    """Heads of one tensor that holds q, k and v.

    Raises:
        LayoutError: the stated sizes do not add up to the tensor's rows.
    """
    order = fused_order(core, fused.module)
    sizes = _fused_sizes(module, core, fused, out, facts, order)
    n, g, d = sizes.heads, sizes.groups, sizes.qk
    per = n // g
    if order == "blocks":
        q, k, v = ([(first + i) * d for i in range(count)] for first, count in ((0, n), (n, g), (n + g, g)))
    elif order == "heads":
        q, k, v = ([(3 * h + j) * d for h in range(n)] for j in range(3))
    elif order == "groups":
        q = [(h // per * (per + 2) + h % per) * d for h in range(n)]
        k, v = ([(i * (per + 2) + per + j) * d for i in range(g)] for j in range(2))
    else:
        local = n // 4  # heads per block; a block is its heads' q, then v, then k
        q = [(h // local * 3 * local + h % local) * d for h in range(n)]
        v, k = [x + local * d for x in q], [x + 2 * local * d for x in q]
    heads, keys, values = (
        tuple(fused.rows(role, x, x + d) for x in starts) for role, starts in (("q", q), ("k", k), ("v", v))
    )
    return Owned(join(heads, output_columns(out, sizes)), join(keys, values), sizes.group_of())


def _fused_sizes(
    module: str, core: nn.Module, fused: Projection, out: Projection | None, facts: Facts, order: str
) -> Sizes:
    # Attention from channels to channels calls its heads groups.
    names = ("groups",) if "channelattention" in type(core).__name__.lower() else HEADS
    heads, rows = facts.get(names), fused.n_out
    if heads is None:
        raise LayoutError(f"{module}: nothing states how many heads the {rows} fused features hold")
    width = out.n_in if out is not None and out.n_in else rows // 3
    head_dim = width // heads
    groups, rest = divmod(rows - heads * head_dim, 2 * head_dim) if head_dim else (0, 1)
    fits = heads * head_dim == width and not rest and groups and heads % groups == 0
    if not fits or (order in ("heads", "codegen") and groups != heads) or (order == "codegen" and heads % 4):
        raise LayoutError(
            f"{module}: {rows} fused features do not divide into q, k and v of {heads} heads of size "
            f"{head_dim} ({width} features enter the output projection)"
        )
    return Sizes(heads, groups, head_dim, head_dim)


def split_pair(q: Projection, kv: Projection, out: Projection | None, sizes: Sizes) -> Owned:
    """Heads of a query projection and one tensor that holds all keys, then all values."""
    groups = join(
        blocks(kv, "k", sizes.groups, sizes.qk),
        blocks(kv, "v", sizes.groups, sizes.v, first=sizes.groups * sizes.qk),
    )
    return Owned(
        join(blocks(q, "q", sizes.heads, sizes.qk), output_columns(out, sizes)), groups, sizes.group_of()
    )


def split_latent(
    module: str, q: Projection, gated: bool, kv_b: Projection, out: Projection, facts: Facts
) -> Owned:
    """Heads of multi-head latent attention.

    Rows of the query projection per head: [nope, rope], and an output gate where it is `gated`;
    of kv_b: [k, v]. The rotary key is one for all heads and belongs to none.

    Raises:
        LayoutError: the stated sizes do not add up to the weights' shapes.
    """
    n, nope, v = (facts.get(names) for names in (HEADS, ("qk_nope_head_dim",), ("v_head_dim",)))
    rope = facts.get(("qk_rope_head_dim",), least=0) or 0
    if not (n and nope and v) or (q.n_out, kv_b.n_out, out.n_in) != (
        n * (nope + rope + v * gated),
        n * (nope + v),
        n * v,
    ):
        raise LayoutError(
            f"{module}: latent attention of {q.n_out} query, {kv_b.n_out} key/value and {out.n_in} output "
            f"features does not divide into {n} heads of {nope} + {rope} and {v}"
        )
    step = nope + rope + v * gated
    heads = blocks(q, "q", n, nope, step=step)
    if rope:
        heads = join(heads, blocks(q, "q_rope", n, rope, first=nope, step=step))
    if gated:
        heads = join(heads, blocks(q, "gate", n, v, first=nope + rope, step=step))
    groups = join(
        blocks(kv_b, "k", n, nope, step=nope + v), blocks(kv_b, "v", n, v, first=nope, step=nope + v)
    )
    return Owned(join(heads, output_columns(out, Sizes(n, n, nope, v))), groups, tuple(range(n)))


def join_differential_pairs(owned: Owned) -> Owned:
    """Differential attention: heads i and i + n/2 form one, and so do their key/value groups.

    Both queries of a pair weigh the same two values, one beside the other, so the pair is the
    smallest unit that owns columns of the output projection: those of heads 2i and 2i + 1 here.
    """
    n, g = len(owned.heads) // 2, len(owned.groups) // 2
    queries, columns = (
        [tuple(part for part in unit if (part.role == "o") == is_o) for unit in owned.heads]
        for is_o in (False, True)
    )
    pairs = tuple((replace(a, stop=b.stop),) for (a,), (b,) in zip(columns[::2], columns[1::2], strict=True))
    heads = join(queries[:n], queries[n:], pairs)
    return Owned(heads, join(owned.groups[:g], owned.groups[g:]), owned.group_of[:n])
