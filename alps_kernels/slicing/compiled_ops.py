"""Opaque custom ops for compiled code: trained slices written into their weight, and dX of a sliced projection."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("alps_kernels::write_slices", mutates_args=("weight",))
def write_slices(weight: Tensor, leaf: Tensor, starts: list[int], stops: list[int], dim: int) -> None:
    """The leaf into its ranges of the weight; one opaque op, so that a compiler copies no whole weight for it."""
    sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
    for start, part in zip(starts, leaf.split(sizes, dim), strict=True):
        weight.narrow(dim, start, part.shape[dim]).copy_(part)


@write_slices.register_fake
def _(weight: Tensor, leaf: Tensor, starts: list[int], stops: list[int], dim: int) -> None:
    return None


@torch.library.custom_op("alps_kernels::input_grad", mutates_args=())
def input_grad(dy: Tensor, weight: Tensor, leaf: Tensor, starts: list[int], stops: list[int], dim: int,
               transposed: bool) -> Tensor:
    """dX = dY W in compiled code, of the weight with the leaf in it.

    FSDP2 fills the weight anew between forward and backward. What is written here is what forward
    wrote, so no other reader can tell; said to be a mutation, it would cost a copy of the weight.
    """
    with torch.autograd._unsafe_preserve_version_counter(weight):
        torch.ops.alps_kernels.write_slices(weight, leaf, starts, stops, dim)
    full = weight.to(dy.dtype)
    return dy.mm(full.t() if transposed else full)


@input_grad.register_fake
def _(dy: Tensor, weight: Tensor, leaf: Tensor, starts: list[int], stops: list[int], dim: int,
      transposed: bool) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[0 if transposed else 1])
