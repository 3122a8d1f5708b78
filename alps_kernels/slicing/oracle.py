"""What `head_grad` means: the whole gradient, cut."""

from __future__ import annotations

import torch
from torch import Tensor


def head_grad(cut: Tensor, other: Tensor, ranges, *, transposed: bool = False) -> Tensor:
    """Rows `ranges` of cut^T other; columns of its transpose."""
    whole = cut.t() @ other
    rows = torch.cat([whole[start:stop] for start, stop in ranges])
    return rows.t() if transposed else rows
