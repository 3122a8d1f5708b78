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


def projection_layer(d_k, d_v, d_model, dtype=torch.float32, task_dtype=None, heads=1, groups=1, delta=2e-4, scale=4.0):
    """q of each head, k and v of each group; neighbouring heads share a group. `scale` is exact in every dtype."""
    shared = tuple(head * groups // heads for head in range(heads))
    layer = (segment(n, rows, d_model, index, delta, dtype, seed, task_dtype) for seed, (n, rows, index) in enumerate(
        [(heads, d_k, None), (groups, d_k, shared), (groups, d_v, shared)]))
    return tuple(Segment(scale * s.base, scale * s.task, s.index) for s in layer)
