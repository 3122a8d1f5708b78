"""Cut separate and packed q, k and v projections into heads: the table of row orders and its use.

The order of the rows of a packed projection cannot be read off its shape: `ROWS` is the one table
of the orders, and `packed_order` says which of them a module uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from einops import rearrange, unpack

from .head_sizes import HEADS, Sizes, read
from .projections import Candidate, Projection
from .slices import HeadSlice, LayoutError

# The orders of a projection's rows, as patterns that sort the rows by part and head (d: the size of one head).
ROWS = {
    # One part, head after head: Llama's q_proj, k_proj and v_proj. Also the columns of every output projection.
    "one": "(head d) -> head d",
    # The query of a head, its output gate, then the next head: Qwen3-Next, Qwen3.5.
    "gated": "(head two d) -> two head d",
    # All of q, then all of k, then all of v; fewer heads in k and v where queries share them: GPT-2, Phi-3, MPT,
    # DBRX, Falcon-7B, torch's MultiheadAttention. Without the queries: a projection of all keys, then all values.
    "blocks": "(member d) -> member d",
    # q, k and v of the first head, then of the second: GPT-NeoX, BLOOM, Persimmon, Falcon-RW.
    "heads": "(head three d) -> three head d",
    # The queries of a key/value group, its key, its value, then the next group: Falcon-40B.
    "groups": "(group member d) -> group member d",
    # Four blocks, each the queries of a quarter of the heads, their values, their keys: CodeGen.
    "codegen": "(block three head d) -> three (block head) d",
    # Parts of different sizes in each head, in latent attention: [nope, rope, gate] of a query, [key, value] of kv_b.
    "latent": "(head row) -> head row",
}

Units = tuple[tuple[HeadSlice, ...], ...]


@dataclass(frozen=True)
class Owned:
    """What the heads of one attention module own, and its output projection; see `slices.AttentionLayer`."""

    heads: Units
    groups: Units
    group_of: tuple[int, ...]
    out: Projection
    kv_layer: int | None = None

    @cached_property
    def weights(self) -> set[str]:
        """Names of the parameters that it owns slices of, without biases."""
        return {part.param for unit in (*self.heads, *self.groups) for part in unit if not part.bias}


def row_numbers(order: str, **sizes: int) -> np.ndarray:
    """The numbers of all rows, sorted as `ROWS[order]` says; `sizes` of every axis on its left side.

    NumPy, because neither a default device nor a fake-tensor mode of torch changes what it makes.
    """
    return rearrange(np.arange(math.prod(sizes.values())), ROWS[order], **sizes)


def cut(take: Callable[[str, int, int], tuple[HeadSlice, ...]], role: str, rows: np.ndarray) -> Units:
    """For every head the slices of its rows.

    Args:
        take: `Projection.rows` or `Projection.columns`.
        role: of the slices.
        rows: row numbers [head, d], or [group, head in the group, d]; those of a head follow each other.
    """
    rows = rearrange(rows, "... d -> (...) d")
    if (np.diff(rows) != 1).any():
        raise AssertionError(f"the {role} rows of a head do not follow each other")
    return tuple(take(role, first, last + 1) for first, last in rows[:, [0, -1]].tolist())


def join(*parts: Units) -> Units:
    """Head by head (or group by group), the slices of all `parts`."""
    return tuple(sum(unit, ()) for unit in zip(*parts, strict=True))


def _owned(heads: Units, groups: Units, out: Projection, sizes: Sizes) -> Owned:
    """The heads with their columns of the output projection."""
    columns = cut(out.columns, "o", row_numbers("one", head=sizes.heads, d=sizes.v))
    return Owned(join(heads, columns), groups, sizes.group_of(), out)


def separate(q: Projection, keys: Sequence[Projection], values: Sequence[Projection], out: Projection, sizes: Sizes,
             wide: int) -> Owned:
    """Heads of separate projections.

    A query twice as wide interleaves [query, gate] per head. There is one key and one value
    projection for every source that is attended to, mostly one; none where the layer attends to
    another layer's keys and values. Where the value projection is the key projection, its rows
    appear in both roles.
    """
    parts = ("q", "gate")[:wide]
    queries = row_numbers("gated", head=sizes.heads, two=wide, d=sizes.qk)
    heads = join(*(cut(q.rows, role, rows) for role, rows in zip(parts, queries, strict=True)))
    of_key, of_value = (row_numbers("one", head=sizes.groups, d=size) for size in (sizes.qk, sizes.v))
    groups = join(*(cut(k.rows, "k", of_key) for k in keys), *(cut(v.rows, "v", of_value) for v in values))
    return _owned(heads, groups, out, sizes)


def split_pair(q: Projection, kv: Projection, out: Projection, sizes: Sizes) -> Owned:
    """Heads of a query projection and one tensor that holds all keys, then all values of the same size."""
    heads = cut(q.rows, "q", row_numbers("one", head=sizes.heads, d=sizes.qk))
    members = row_numbers("blocks", member=2 * sizes.groups, d=sizes.qk)
    keys, values = unpack(members, [[sizes.groups], [sizes.groups]], "* d")
    return _owned(heads, join(cut(kv.rows, "k", keys), cut(kv.rows, "v", values)), out, sizes)


def packed_order(at: Candidate, packed: Projection) -> str:
    """How q, k and v lie in a packed projection: "blocks", "heads", "groups" or "codegen" of `ROWS`."""
    if type(at.module).__name__.startswith("CodeGen"):
        return "codegen"
    if read(at.module, "new_decoder_architecture") is True:
        return "groups"
    multi_query = read(at.module, "multi_query")
    if multi_query is not None:
        return "blocks" if multi_query else "heads"
    return "heads" if packed.module.rpartition(".")[2] in ("query_key_value", "in_proj") else "blocks"


def split_packed(at: Candidate, packed: Projection, out: Projection) -> Owned:
    """Heads of one tensor that holds q, k and v.

    Raises:
        LayoutError: the stated sizes do not add up to the tensor's rows.
    """
    order = packed_order(at, packed)
    sizes = _packed_sizes(at, packed, out, order)
    n, g, d = sizes.heads, sizes.groups, sizes.qk
    if order == "blocks":
        q, k, v = unpack(row_numbers(order, member=n + 2 * g, d=d), [[n], [g], [g]], "* d")
    elif order == "heads":
        q, k, v = row_numbers(order, head=n, three=3, d=d)
    elif order == "groups":
        q, k, v = unpack(row_numbers(order, group=g, member=n // g + 2, d=d), [[n // g], [], []], "group * d")
    else:
        q, v, k = row_numbers(order, block=4, three=3, head=n // 4, d=d)
    return _owned(cut(packed.rows, "q", q), join(cut(packed.rows, "k", k), cut(packed.rows, "v", v)), out, sizes)


def _packed_sizes(at: Candidate, packed: Projection, out: Projection, order: str) -> Sizes:
    # Attention from channels to channels calls its heads groups.
    names = ("groups",) if "channelattention" in type(at.module).__name__.lower() else HEADS
    heads, rows = at.states(*names), packed.n_out
    if heads is None:
        raise LayoutError(f"{at.name}: nothing states how many heads the {rows} fused features hold")
    width = out.n_in or rows // 3
    head_dim = width // heads
    groups, rest = divmod(rows - heads * head_dim, 2 * head_dim) if head_dim else (0, 1)
    fits = heads * head_dim == width and not rest and groups and heads % groups == 0
    if not fits or (order in ("heads", "codegen") and groups != heads) or (order == "codegen" and heads % 4):
        raise LayoutError(f"{at.name}: {rows} fused features do not divide into q, k and v of {heads} heads of size "
                          f"{head_dim} ({width} features enter the output projection)")
    return Sizes(heads, groups, head_dim, head_dim)


def split_latent(at: Candidate, q: Projection, gated: bool, kv_b: Projection, out: Projection) -> Owned:
    """Heads of multi-head latent attention.

    Rows of the query projection per head: [nope, rope], and an output gate where it is `gated`;
    of kv_b: [k, v]. The rotary key is one for all heads and belongs to none.

    Raises:
        LayoutError: the stated sizes do not add up to the weights' shapes.
    """
    n, nope, v = at.states(*HEADS), at.states("qk_nope_head_dim"), at.states("v_head_dim")
    rope = at.states("qk_rope_head_dim", least=0) or 0
    found = q.n_out, kv_b.n_out, out.n_in
    if not (n and nope and v) or found != (n * (nope + rope + v * gated), n * (nope + v), n * v):
        raise LayoutError(
            f"{at.name}: latent attention of {q.n_out} query, {kv_b.n_out} key/value and {out.n_in} output "
            f"features does not divide into {n} heads of {nope} + {rope} and {v}"
        )
    parts = {"q": nope, "q_rope": rope, "gate": v * gated}
    queries = unpack(row_numbers("latent", head=n, row=sum(parts.values())), [[s] for s in parts.values()], "head *")
    heads = join(*(cut(q.rows, role, rows) for role, rows in zip(parts, queries, strict=True) if parts[role]))
    keys, values = unpack(row_numbers("latent", head=n, row=nope + v), [[nope], [v]], "head *")
    groups = join(cut(kv_b.rows, "k", keys), cut(kv_b.rows, "v", values))
    return _owned(heads, groups, out, Sizes(n, n, nope, v))


def add_bare_biases(at: Candidate, owned: Owned) -> Owned:
    """Adds biases of q, k and v that are bare parameters beside a projection without one."""

    def add(units: Units, role: str) -> Units:
        bias = at.module._parameters.get(f"{role}_bias")
        if bias is None or bias.ndim != 1 or not units or bias.numel() % len(units):
            return units

        def take(role: str, start: int, stop: int) -> tuple[HeadSlice, ...]:
            return (HeadSlice(at.names[id(bias)], role, 0, start, stop, bias=True),)

        return join(units, cut(take, role, row_numbers("one", head=len(units), d=bias.numel() // len(units))))

    return replace(owned, heads=add(owned.heads, "q"), groups=add(add(owned.groups, "k"), "v"))


def join_differential_pairs(owned: Owned) -> Owned:
    """Differential attention: heads i and i + n/2 form one, and so do their key/value groups.

    Both queries of a pair weigh the same two values, one beside the other, so the pair is the
    smallest unit that owns columns of the output projection: those of heads 2i and 2i + 1 here.
    """
    n, g = len(owned.heads) // 2, len(owned.groups) // 2
    queries, columns = (
        [tuple(part for part in unit if (part.role == "o") == is_o) for unit in owned.heads] for is_o in (False, True)
    )
    pairs = tuple((replace(a, stop=b.stop),) for (a,), (b,) in zip(columns[::2], columns[1::2], strict=True))
    heads, groups = join(queries[:n], queries[n:], pairs), join(owned.groups[:g], owned.groups[g:])
    return replace(owned, heads=heads, groups=groups, group_of=owned.group_of[:n])
