"""The CPU backend: the arithmetic of `oracle`, written all or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .oracle import new_values
from .param_update import HyperTable, ParamUpdate

PENDING = 2**20  # bytes of new values that wait for one another: they stay in the cache


@torch.no_grad()
def head_adamw_(updates: Sequence[ParamUpdate], hypers: HyperTable, *, control: Tensor | None = None,
                seed: int = 0) -> None:
    """One AdamW step, in place.

    Everything is computed before anything is written, and written by one call, each parameter's
    `step` with it: an error or an interrupt on the way finds all of it done or nothing. Above
    `PENDING` bytes that holds for a run of parameters at a time.
    """
    factor, skip = (1.0, 0.0) if control is None else control.tolist()
    if skip != 0:
        return
    pairs, pending = [], 0
    for update in updates:
        first = len(pairs)
        pairs += new_values(update, hypers, factor, seed)
        pending += sum([pair[1].nbytes for pair in pairs[first:]])
        if pairs and (pending > PENDING or update is updates[-1]):
            torch._foreach_copy_(*zip(*pairs, strict=True))  # in one call, which nothing interrupts
            pairs, pending = [], 0


def head_grad_norm(updates: Sequence[ParamUpdate]) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone, a float64 scalar.

    Squares are summed in float32 within a block and in float64 across blocks, always in the
    same order. Raises nothing; a NaN or Inf in a selected gradient shows in the result.
    """
    norms = [
        torch.linalg.vector_norm(block.of(u.grad) if block is not None else u.grad,
                                 dtype=torch.float64 if u.grad.dtype == torch.float64 else torch.float32)
        for u in updates for block in (u.blocks if u.blocks is not None else (None,)) if u.grad.numel()
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]))
