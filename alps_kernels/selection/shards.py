"""What of a sharded (DTensor) parameter this rank holds, and its share of what trains.

A rank holds a rectangle of the parameter; a compact state holds the selected elements, globally
in the order of `BoundParam.cut`, on each rank those of its rectangle in the same order. Tensors
that are not sharded are held whole: everything here works on them too and sends nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from ..tensors import Range, is_sharded, local_bounds, local_part, matrix_shape, sum_bytes_
from .binding import BoundParam


def check_shards(part: BoundParam) -> None:
    """Raises ValueError where the parameter is sharded in a way that cannot be followed."""
    param = part.param
    if not is_sharded(param):
        return
    where = f"{part.name} is a DTensor with placements {tuple(param.placements)}"
    if any(type(placement).__name__ not in ("Shard", "Replicate") for placement in param.placements):
        raise ValueError(f"{where}; expected Shard and Replicate")
    if not part.full and any(p.is_shard() and p.dim > 0 for p in param.placements) and param.ndim != 2:
        raise ValueError(f"{where} and {param.ndim} dimensions, of which a part trains; expected it sharded along 0")
    held = tuple(stop - start for start, stop in local_bounds(param))
    if held != tuple(param._local_tensor.shape):
        raise ValueError(f"{where}: this rank holds {list(param._local_tensor.shape)}, expected {list(held)}")


def clip(part: BoundParam, edge: int) -> int:
    """A position along the axis that is cut, as one along that axis of what this rank holds."""
    first, last = _rectangle(part.param)[part.dim]
    return min(max(edge, first), last) - first


def part_here(part: BoundParam) -> BoundParam:
    """What trains of the local tensor."""
    if not is_sharded(part.param):
        return part
    ranges = ((clip(part, start), clip(part, stop)) for start, stop in part.ranges)
    return replace(part, param=local_part(part.param), ranges=tuple(r for r in ranges if r[0] < r[1]))


def cut_compact(part: BoundParam, whole: Tensor) -> Tensor:
    """This rank's elements of a compact tensor, [part.numel], as a new tensor."""
    if not is_sharded(part.param):
        return whole.clone()
    mine = whole.new_empty(part_here(part).numel)
    for of_whole, of_mine in _matching_blocks(part, whole, mine):
        of_mine.copy_(of_whole)
    return mine


def gather_compact(part: BoundParam, mine: Tensor) -> Tensor:
    """The compact tensor [part.numel] of which every rank holds its elements: the same bytes on every rank.

    A collective of the ranks that hold the parameter.
    """
    if not is_sharded(part.param):
        return mine
    whole = mine.new_zeros(part.numel)
    for of_whole, of_mine in _matching_blocks(part, whole, mine):
        of_whole.copy_(of_mine)
    return sum_bytes_(whole, part.param)


def _rectangle(param: Tensor) -> tuple[Range, Range]:
    """The rows and the columns of `as_matrix(param)` that this rank holds."""
    spans = local_bounds(param)
    rows = spans[0] if spans else (0, 1)
    return rows, spans[1] if len(spans) == 2 else (0, matrix_shape(param.shape)[1])


def _matching_blocks(part: BoundParam, whole: Tensor, mine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every range the same elements as 2-D views of the global compact tensor and of this rank's."""
    rectangle, at, here = _rectangle(part.param), 0, 0
    for span in part.ranges:
        block = [(0, size) for size in matrix_shape(part.param.shape)]
        block[part.dim] = span
        height, width = (stop - start for start, stop in block)
        held = [(max(a, c), max(max(a, c), min(b, d))) for (a, b), (c, d) in zip(block, rectangle, strict=True)]
        (top, bottom), (left, right) = ((start - first, stop - first)
                                        for (start, stop), (first, _) in zip(held, block, strict=True))
        size = (bottom - top) * (right - left)
        yield (whole[at:at + height * width].view(height, width)[top:bottom, left:right],
               mine[here:here + size].view(bottom - top, right - left))
        at, here = at + height * width, here + size
