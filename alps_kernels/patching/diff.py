"""How two head patches differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..tensors import Ranges, intersect
from .patch import HeadPatch


@dataclass(frozen=True)
class SharedSlices:
    """Rows or columns that both patches hold.

    Attributes:
        differing: elements whose bytes differ.
        largest: the largest difference of two values; NaN where one is not a number.
    """

    tensor: str
    dim: int
    ranges: Ranges
    numel: int
    differing: int
    largest: float


@dataclass(frozen=True)
class PatchDiff:
    """What `diff_patches` found; heads as (layer, head)."""

    names: tuple[str, str]
    same_base: bool
    only_first: list[tuple[int, int]]
    only_second: list[tuple[int, int]]
    both: list[tuple[int, int]]
    shared: list[SharedSlices]
    equal: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        first, second = self.names
        lines = ["the two are the same" if self.equal else "the two differ",
                 "of one base" if self.same_base else "of different bases",
                 f"heads in both {len(self.both)}, in {first} alone {len(self.only_first)}, "
                 f"in {second} alone {len(self.only_second)}"]
        numel, differing = (sum(getattr(part, key) for part in self.shared) for key in ("numel", "differing"))
        lines.append(f"{numel:,} values are in both, {differing:,} of them differ" if self.shared else
                     "they share no slice: both can be on a model at once")
        lines += [f"  {part.tensor} {'columns' if part.dim else 'rows'} {[list(span) for span in part.ranges]}: "
                  f"{part.differing:,} of {part.numel:,} differ, by {part.largest:.3g} at most"
                  for part in self.shared if part.differing]
        return "\n".join(lines)


def diff_patches(first: HeadPatch, second: HeadPatch) -> PatchDiff:
    """Compare two patches: base, heads, and the values of slices that both hold."""
    shared = list(_shared(first, second))
    same_base = _same_base(first, second)
    equal = (same_base and first.selection == second.selection and first.cuts == second.cuts
             and not any(part.differing for part in shared))
    a, b = set(first.selection), set(second.selection)
    return PatchDiff((first.name, second.name), same_base, sorted(a - b), sorted(b - a), sorted(a & b), shared, equal)


def _same_base(first: HeadPatch, second: HeadPatch) -> bool:
    """By the digests of whole bases where both are known, else of what neither patch cuts."""
    if None not in (first.base_fingerprint, second.base_fingerprint):
        return first.base_fingerprint == second.base_fingerprint
    uncut = first.outside.keys() - first.cuts.keys() - second.cuts.keys()
    return (first.outside.keys() == second.outside.keys()
            and all(first.outside[name] == second.outside[name] for name in uncut))


def _shared(first: HeadPatch, second: HeadPatch) -> Iterator[SharedSlices]:
    for name in (name for name in first.cuts if name in second.cuts):
        a, b = first.cuts[name], second.cuts[name]
        both = replace(a, ranges=intersect(a.ranges, b.ranges))
        if (a.info, a.dim) != (b.info, b.dim) or not both.ranges:
            continue
        ours, theirs = (both.take(_spread(patch, name)) for patch in (first, second))
        differ = (ours.view(torch.uint8) != theirs.view(torch.uint8)).view(*ours.shape, ours.element_size()).any(-1)
        gap = (ours.double() - theirs.double())[differ].abs()
        largest = gap.max().item() if gap.numel() else 0.0
        yield SharedSlices(name, a.dim, both.ranges, ours.numel(), int(differ.sum()), largest)


def _spread(patch: HeadPatch, name: str) -> Tensor:
    """A whole parameter in which only the patch's slices are set."""
    whole = patch.values[name].new_empty(patch.cuts[name].shape)
    patch.cuts[name].put(patch.values[name], whole)
    return whole
