"""How alike two rankings of the same heads are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """How alike two rankings of the same heads are.

    Attributes:
        k: heads in each top.
        shared: heads in both tops.
        jaccard: shared heads over heads in either top.
        spearman: rank correlation of all scores, NaN where one ranking is all ties.
    """

    k: int
    shared: int
    jaccard: float
    spearman: float

    @property
    def share(self) -> float:
        """Share of one top that is in the other."""
        return self.shared / self.k if self.k else 1.0

    def __str__(self) -> str:
        return (f"top {self.k}: {self.shared} shared ({self.share:.1%}, Jaccard {self.jaccard:.3f}); "
                f"Spearman {self.spearman:.4f} over all heads")


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors, tied values at their average rank."""
    x, y = (ranks - ranks.mean() for ranks in (_ranks(a), _ranks(b)))
    scale = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / scale if scale else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Ascending ranks from 1, float64 [n]; equal values share the mean of their places."""
    _, group, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(torch.float64)
    return (last - (counts - 1) / 2)[group]
