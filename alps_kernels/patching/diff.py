"""How two head patches differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..tensors import Ranges, merge
from .patch import HeadPatch
from .slices_file import TensorSlice


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
                 f"heads in both {len(self.both)}, in {first} alone {len(self.only_first)}, in {second} alone {len(self.only_second)}"]
        numel, differing = (sum(getattr(part, key) for part in self.shared) for key in ("numel", "differing"))
        lines.append(f"{numel:,} values are in both, {differing:,} of them differ" if self.shared else
                     "they share no slice: both can be on a model at once")
        lines += [f"  {part.tensor} {'columns' if part.dim else 'rows'} {[list(span) for span in part.ranges]}: "
                  f"{part.differing:,} of {part.numel:,} differ, by {part.largest:.3g} at most" for part in self.shared if part.differing]
        return "\n".join(lines)


def diff_patches(first: HeadPatch, second: HeadPatch) -> PatchDiff:
    """Compare two patches: base, heads, and the values of slices that both hold."""
    shared = [part for name in first.cuts if name in second.cuts if (part := _shared(name, first, second)) is not None]
    same_base = _same_base(first, second)
    equal = (same_base and first.selection == second.selection and first.cuts == second.cuts
             and not any(part.differing for part in shared))
    a, b = set(first.selection), set(second.selection)
    return PatchDiff((first.name, second.name), same_base, sorted(a - b), sorted(b - a), sorted(a & b), shared, equal)


def _same_base(first: HeadPatch, second: HeadPatch) -> bool:
    """By the digests of whole bases where both are known, else of what neither patch cuts."""
    if None not in (first.base_fingerprint, second.base_fingerprint):
        return first.base_fingerprint == second.base_fingerprint
    whole = [{name: known for name, known in patch.outside.items() if name not in first.cuts and name not in second.cuts}
             for patch in (first, second)]
    return whole[0] == whole[1] and first.outside.keys() == second.outside.keys()


def _shared(name: str, first: HeadPatch, second: HeadPatch) -> SharedSlices | None:
    a, b = first.cuts[name], second.cuts[name]
    if (a.shape, a.dtype, a.dim) != (b.shape, b.dtype, b.dim):
        return None
    ranges = merge((max(x[0], y[0]), min(x[1], y[1])) for x in a.ranges for y in b.ranges)
    if not ranges:
        return None
    ours, theirs = (_only(cut, ranges, values) for cut, values in ((a, first.values[name]), (b, second.values[name])))
    size = ours.element_size()
    bytes_differ = (ours.view(torch.uint8) != theirs.view(torch.uint8)).view(*ours.shape, size).any(-1)
    gap = (ours.double() - theirs.double())[bytes_differ].abs()
    return SharedSlices(name, a.dim, ranges, ours.numel(), int(bytes_differ.sum()), gap.max().item() if gap.numel() else 0.0)


def _only(cut: TensorSlice, ranges: Ranges, values: Tensor) -> Tensor:
    """Of the values of a cut those in `ranges`."""
    at, parts = 0, []
    for start, stop in cut.ranges:
        parts += [values.narrow(cut.dim, at + max(start, a) - start, min(stop, b) - max(start, a))
                  for a, b in ranges if max(start, a) < min(stop, b)]
        at += stop - start
    return torch.cat(parts, cut.dim).contiguous()
