"""Half-open ranges of rows or columns, and the matrix view in which they count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

Range = tuple[int, int]
Ranges = tuple[Range, ...]


def merge(ranges: Iterable[Range]) -> Ranges:
    """Half-open ranges sorted, overlapping and adjacent ones joined, empty ones dropped."""
    merged: list[Range] = []
    for start, stop in sorted(r for r in ranges if r[0] < r[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def complement(ranges: Ranges, extent: int) -> Ranges:
    """What of [0, extent) lies in none of `ranges` (merged)."""
    edges = [0, *(edge for span in ranges for edge in span), extent]
    return merge(zip(edges[::2], edges[1::2], strict=True))


def intersect(a: Ranges, b: Ranges) -> Ranges:
    """What lies in both, merged."""
    return merge((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns of `as_matrix`, from a tensor's shape."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def as_matrix(tensor: Tensor) -> Tensor:
    """The 2-D view in which rows and columns count: [shape[0], -1]; a vector is [n, 1]."""
    return tensor if tensor.ndim == 2 else tensor.view(matrix_shape(tensor.shape))  # no copy: callers write through it


def blocks(tensor: Tensor, dim: int, ranges: Iterable[Range]) -> list[Tensor]:
    """The ranges of rows (dim 0) or columns (dim 1) of `as_matrix(tensor)`, as 2-D views."""
    matrix = as_matrix(tensor)
    return [matrix.narrow(dim, start, stop - start) for start, stop in ranges]
