"""The gradient of selected rows or columns of a weight, and of nothing else of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import Ranges


def select_columns(tensor: Tensor, ranges: Ranges) -> Tensor:
    """The columns `ranges` of `tensor` [n, k], side by side: a view where they are one run."""
    parts = [tensor.narrow(-1, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def head_grad(a: Tensor, b: Tensor, ranges: Ranges, *, transposed: bool = False) -> Tensor:
    """G = a[:, ranges]^T b, one strided GEMM where the ranges are one run.

    Of `nn.Linear` the rows `ranges` of dW are `head_grad(dy, x, ranges)`, its columns
    `head_grad(x, dy, ranges, transposed=True)`; of a Conv1D, whose weight lies the other way,
    it is the reverse.

    Several runs are either gathered first, 2 n n_sel elements moved and one GEMM over all of
    them, or multiplied run by run, which reads `b` (runs - 1) n m elements more often and
    gives a GPU GEMMs of one head's 64 to 128 rows each, a few dozen thread blocks. At a tenth of
    the heads the gather moves a small part of what it saves; it loses where almost every row is
    selected. A Triton GEMM with gathered operands would save that copy alone, about
    2 n_sel / m of one reading of `b`, and has to match cuBLAS in all else: none is here.

    Args:
        a: [n, k], the operand whose columns are selected.
        b: [n, m], of the same dtype.
        ranges: half-open, along k; sorted, disjoint, at least one.
        transposed: give G^T.

    Returns:
        [n_sel, m], or [m, n_sel], in the dtype of the inputs, as autograd forms dW.
    """
    n_sel = sum(stop - start for start, stop in ranges)
    if 2 * n_sel <= (len(ranges) - 1) * b.shape[1]:
        ranges, a = ((0, n_sel),), select_columns(a, ranges)
    parts = [a.narrow(1, start, stop - start) for start, stop in ranges]
    grads = [b.t().mm(part) if transposed else part.t().mm(b) for part in parts]
    return grads[0] if len(grads) == 1 else torch.cat(grads, int(transposed))
