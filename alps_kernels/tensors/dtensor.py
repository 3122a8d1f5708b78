"""DTensor helpers: which part of a sharded tensor this rank holds, and moving data between the ranks.

Tensors that are not sharded are held whole: most of this works on them too and sends nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ranges import Range


def is_sharded(tensor: Tensor) -> bool:
    """It is a DTensor (told without importing torch.distributed)."""
    return hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def local_bounds(tensor: Tensor) -> list[Range]:
    """For every dimension the half-open range that this rank holds: equal chunks, the last ones short or empty."""
    spans = [(0, size) for size in tensor.shape]
    if is_sharded(tensor):
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard():
                first, last = spans[placement.dim]
                chunk = -(-(last - first) // tensor.device_mesh.size(axis))
                start = min(first + tensor.device_mesh.get_local_rank(axis) * chunk, last)
                spans[placement.dim] = (start, min(start + chunk, last))
    return spans


def placed_like(param: Tensor, held: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """`held`, this rank's share of a tensor of the parameter's shape, as a tensor placed as the parameter is.

    Args:
        shape: of the whole tensor where it is another, with more or fewer dimensions at the end.
    """
    if not is_sharded(param):
        return held
    from torch.distributed.tensor import DTensor

    whole = torch.empty(param.shape if shape is None else tuple(shape), dtype=held.dtype, device="meta")
    return DTensor.from_local(held, param.device_mesh, param.placements, run_check=False,
                              shape=whole.shape, stride=whole.stride())


def viewed(tensor: Tensor, view: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """`view` of what this rank holds of a tensor, as a tensor of `shape` placed as it is."""
    return placed_like(tensor, view(local_part(tensor)), shape)


def share_of(param: Tensor, value: Tensor) -> Tensor:
    """This rank's share of `value`: of the parameter's shape, placed like it, otherwise, or not sharded at all."""
    if is_sharded(value):
        if is_sharded(param) and value.device_mesh == param.device_mesh:
            return local_part(value if value.placements == param.placements else
                         value.redistribute(param.device_mesh, param.placements))
        value = value.full_tensor()
    for dim, (start, stop) in enumerate(local_bounds(param)):
        value = value.narrow(dim, start, stop - start)
    return value


def shard_groups(param: Tensor) -> list[Any]:
    """The process groups whose ranks hold different shards, outermost first."""
    return [param.device_mesh.get_group(axis) for axis, p in enumerate(param.placements) if p.is_shard()]


def sum_bytes_(whole: Tensor, param: Tensor) -> Tensor:
    """Every rank's bytes in the place of zeros on the others: one tensor on all ranks that hold `param`'s shards."""
    for group in shard_groups(param):  # each byte is one rank's, so that no sum carries or rounds
        torch.distributed.all_reduce(whole.view(torch.uint8), group=group)
    return whole


@torch.no_grad()
def sum_of_squares(params: Sequence[Tensor], square: Callable[[list[int]], Tensor]) -> Tensor:
    """A sum over all elements of parameters, each shard counted once: the same bits on every rank.

    Args:
        params: replicated, sharded or plain.
        square: the local sum over the parameters at these positions, a float64 scalar.
    """
    together = defaultdict(list)
    for index, param in enumerate(params):
        key = (param.device_mesh, tuple(p.is_shard() for p in param.placements)) if is_sharded(param) else None
        together[key].append(index)
    total = None
    for key, members in together.items():
        one = square(members)
        for group in shard_groups(params[members[0]]) if key else ():
            every = [torch.empty_like(one) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(every, one, group=group)
            one = torch.stack(every).sum()  # in the order of ranks
        total = one if total is None else total + one.to(total.device)
    return total


def write_ranges(weight: Tensor, leaf: Tensor, dim: int, ranges: Sequence[Range]) -> None:
    """A leaf into its ranges along `dim` of a weight, both sharded: a collective, which sends the leaf."""
    for of_shard, of_leaf in _overlaps(weight, leaf.full_tensor(), dim, ranges):
        of_shard.copy_(of_leaf)


def read_ranges(weight: Tensor, dim: int, ranges: Sequence[Range]) -> Tensor:
    """The ranges along `dim` of a sharded weight as one plain tensor on every rank: a collective, which sends them."""
    shape = list(weight.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    whole = local_part(weight).new_zeros(shape)
    for of_shard, of_leaf in _overlaps(weight, whole, dim, ranges):
        of_leaf.copy_(of_shard)
    return sum_bytes_(whole, weight)


def _overlaps(weight: Tensor, leaf: Tensor, dim: int, ranges: Sequence[Range]) -> list[tuple[Tensor, Tensor]]:
    """The elements of every range that this rank holds, as views of the weight's shard and of the whole leaf."""
    pairs, at = [], 0
    for span in ranges:
        of_shard, of_leaf = local_part(weight), leaf.narrow(dim, at, span[1] - span[0])
        at += span[1] - span[0]
        for axis, (first, last) in enumerate(local_bounds(weight)):
            start, stop = span if axis == dim else (0, weight.shape[axis])
            low = min(max(start, first), last)
            size = max(min(stop, last) - low, 0)
            of_shard = of_shard.narrow(axis, low - first, size)
            of_leaf = of_leaf.narrow(axis, low - start if size else 0, size)
        pairs.append((of_shard, of_leaf))
    return pairs
