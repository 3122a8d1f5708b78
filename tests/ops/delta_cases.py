"""Weights and the same weights a little moved, which tests of scoring share."""

import torch

from alps_kernels.ops import Segment


def pair(shape, dtype=torch.float32, task_dtype=None, delta=1e-3, seed=0):
    """A base and a task tensor, `delta` times a normal variable apart before they are rounded."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.05 * torch.randn(shape, generator=generator)).to(dtype)
    return base, (base.float() + delta * torch.randn(shape, generator=generator)).to(task_dtype or dtype)


def segment(n, rows, cols, index=None, delta=1e-3, dtype=torch.float32, seed=0, task_dtype=None):
    """n matrices; by default head i reads the i-th."""
    return Segment(*pair((n, rows, cols), dtype, task_dtype, delta, seed), tuple(range(n) if index is None else index))
