"""One AdamW step on the selected slices of many weights: checks, and the way to a backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import reference
from .updates import Update


def head_adamw_(updates: Sequence[Update], *, control: Tensor | None = None, seed: int = 0) -> None:
    """One AdamW step, in place; see `reference.head_adamw_`.

    Args:
        updates: parameters of any dtypes, on any devices; `check` has passed them.
        control: [2] float32 on the parameters' device: what gradients are multiplied by, and
            whether (not zero) nothing may move.
        seed: of stochastic rounding.
    """
    reference.head_adamw_(updates, control=control, seed=seed)


def head_grad_norm(updates: Sequence[Update]) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone; see `reference.head_grad_norm`."""
    return reference.head_grad_norm(updates)
