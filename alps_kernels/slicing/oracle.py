"""The meaning of `head_grad`: the whole gradient, cut."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import Ranges


def head_grad(a: Tensor, b: Tensor, ranges: Ranges, *, transposed: bool = False) -> Tensor:
    """Rows `ranges` of a^T b; columns of its transpose."""
    whole = a.t() @ b
    rows = torch.cat([whole[start:stop] for start, stop in ranges])
    return rows.t() if transposed else rows
