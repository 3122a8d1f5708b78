"""Representations of a head: which of its matrices are compared, as views of the stored weights.

Biases and output gates are no part of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from ..layout import AttentionLayer, HeadSlice, LayoutError
from ..ops import Segment
from ..tensors import as_matrix

# The roles whose matrices are flattened and concatenated, in this order. A latent query (MLA) has
# rotary rows of its own, which are part of q.
FLAT = {
    "qkv": ("q", "q_rope", "k", "v"),
    "q": ("q", "q_rope"),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "qkvo": ("q", "q_rope", "k", "v", "o"),
}
REPRESENTATIONS = ("projection", *FLAT)


def pieces(layers: Sequence[AttentionLayer], layer: AttentionLayer, representation: str) -> list[Piece]:
    """The blocks that `representation` compares of every head of `layer`.

    Args:
        layers: all layers of the layout: keys and values may be another layer's.
        layer: the one to compare.

    Returns:
        one entry per segment; for "projection" exactly those of q, k and v.

    Raises:
        LayoutError: the layer has no such matrix, or one in several pieces; it names the layer.
    """
    roles = ("q", "k", "v") if representation == "projection" else FLAT[representation]
    found = []
    for role in roles:
        here = _role(layers, layer, role)
        if not here and role != "q_rope":
            raise LayoutError(f"{layer.module}: its heads own no {role} weight, which {representation!r} compares; "
                              f"they own {sorted({part.role for part in layer.slices(0)})}")
        if representation == "projection" and len(here) != 1:
            raise LayoutError(f"{layer.module}: the {role} weight of a head lies in {len(here)} pieces, "
                              "so no projection can be formed; use representation='qkv'")
        found += here
    return found


class Piece:
    """One block of every query head, or of every key/value group, of a layer.

    Attributes:
        blocks: one slice per head or group, all of one shape.
        index: for every query head, which of `blocks` it reads.
    """

    def __init__(self, blocks: tuple[HeadSlice, ...], index: tuple[int, ...]) -> None:
        self.blocks, self.index = blocks, index

    @property
    def role(self) -> str:
        return self.blocks[0].role

    @property
    def params(self) -> set[str]:
        return {block.param for block in self.blocks}

    def segment(self, base: Mapping[str, Tensor], task: Mapping[str, Tensor], rename: Callable[[str], str]) -> Segment:
        """The blocks of both models; `rename` turns a base parameter's name into the task's."""
        step = self._step()
        return Segment(*(self._stacked(weights, step) for weights in (
            base, {name: task[rename(name)] for name in self.params})), self.index)

    def _step(self) -> int | None:
        """How far each block is from the one before in the same parameter; None where they do not lie evenly."""
        first, *others = self.blocks
        step = others[0].start - first.start if others else 0
        even = all((block.param, block.dim, block.start, block.stop) == (first.param, first.dim, at, at + first.size)
                   for at, block in zip(count(first.start + step, step), others, strict=False))
        return step if even and step >= 0 else None

    def _stacked(self, weights: Mapping[str, Tensor], step: int | None) -> Tensor:
        """All blocks, [n, rows, cols]."""
        if step is None:
            return stacked([block.matrix(weights[block.param]) for block in self.blocks])
        first = self.blocks[0]
        weight = weights[first.param]
        return _spread(first.matrix(weight), len(self.blocks), step * as_matrix(weight).stride(first.dim))


def _role(layers: Sequence[AttentionLayer], layer: AttentionLayer, role: str) -> list[Piece]:
    if role in ("k", "v"):
        owner = layer if layer.kv_layer is None else layers[layer.kv_layer]
        units, index = owner.groups, layer.group_of
    else:
        units, index = layer.heads, tuple(range(layer.n_heads))
    rows = [[part for part in unit if part.role == role and not part.bias] for unit in units]
    if len({len(row) for row in rows}) > 1:
        raise LayoutError(f"{layer.module}: its heads own different numbers of {role} blocks")
    return [Piece(blocks, index) for blocks in zip(*rows, strict=True)]


def stacked(blocks: Sequence[Tensor]) -> Tensor:
    """Equal blocks [rows, cols] as [n, rows, cols]: a view where they lie evenly in one tensor, else a copy."""
    first = blocks[0]
    offsets = [block.storage_offset() for block in blocks]
    step = offsets[1] - offsets[0] if len(blocks) > 1 else first.numel()
    even = all(b - a == step for a, b in zip(offsets, offsets[1:], strict=False))
    if step >= 0 and even and all(_alike(block, first) for block in blocks):
        return _spread(first, len(blocks), step)
    return torch.stack(list(blocks))


def _spread(first: Tensor, n: int, step: int) -> Tensor:
    """`first` and the n - 1 blocks like it that begin `step` elements of memory one after the other, a view."""
    # No pattern of einops: the blocks may leave gaps that divide no axis evenly.
    return first.as_strided((n, *first.shape), (step, *first.stride()))


def _alike(block: Tensor, first: Tensor) -> bool:
    return (block.shape, block.stride(), block.untyped_storage().data_ptr()) == (
        first.shape, first.stride(), first.untyped_storage().data_ptr())


def check_projection(layer: AttentionLayer, segments: Sequence[Segment]) -> None:
    """q^T k v^T must have shapes that meet.

    Raises:
        LayoutError: they do not; the message names the layer and another representation.
    """
    q, k, v = (tuple(segment.base.shape[1:]) for segment in segments)
    if q[0] != k[0] or k[1] != v[1]:
        raise LayoutError(f"{layer.module}: q {list(q)}, k {list(k)} and v {list(v)} of a head do not multiply to "
                          "q^T k v^T; use representation='qkv'")
