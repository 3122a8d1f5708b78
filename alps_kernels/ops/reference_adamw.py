"""What `head_adamw_` means, in plain PyTorch: the CPU backend, and the oracle of the kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference_rounding import join, random_bits, round_stochastically, split_
from .updates import Block, Hyper, Update

PARAM_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = range(3)  # which rounding a random number is for


@torch.no_grad()
def head_adamw_(updates: Sequence[Update], *, control: Tensor | None = None, seed: int = 0) -> None:
    """One AdamW step on the selected blocks of many parameters, in place.

        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)
        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2

    In the order of operations of torch.optim.AdamW's single-tensor path, so that float32
    parameters come out bit-equal to it. 16-bit parameters and moments are widened to float32
    and rounded once, at the end.

    Args:
        updates: any mixture of dtypes, devices and precisions.
        control: [2] float32: gradients are multiplied by the first number; nothing moves where
            the second is not zero.
        seed: of stochastic rounding.
    """
    if control is not None and control[1] != 0:
        return
    scale = 1.0 if control is None else control[0].item()
    for update in updates:
        for hyper, blocks in update.parts():
            _step_blocks(update, hyper, blocks, scale, seed)


def _step_blocks(update: Update, hyper: Hyper, blocks: list[Block | None], scale: float, seed: int) -> None:
    wide = torch.float64 if update.param.dtype == torch.float64 else torch.float32
    params, grads = ([t if b is None else b.of(t) for b in blocks] for t in (update.param, update.grad))

    def state(tensor: Tensor) -> list[Tensor]:
        return [tensor if b is None else b.of_state(tensor, p.shape) for b, p in zip(blocks, params, strict=True)]

    def bits(purpose: int) -> list[Tensor]:
        flat = random_bits(update.exp_avg.numel(), seed, int(hyper.step), update.stream, purpose, update.param.device)
        return state(flat.view(update.exp_avg.shape))

    stored = [state(update.exp_avg), state(update.exp_avg_sq)]
    if update.max_exp_avg_sq is not None:
        stored.append(state(update.max_exp_avg_sq))
    low = state(update.low) if update.low is not None else [None] * len(blocks)
    masters = [join(p, extra) for p, extra in zip(params, low, strict=True)]
    grads = [g.to(wide) if scale * hyper.sign == 1.0 else g.to(wide) * (scale * hyper.sign) for g in grads]
    moments = [[t.to(wide) for t in tensors] for tensors in stored]
    adamw_(masters, grads, *moments, hyper=hyper)

    if update.exp_avg.dtype != wide:
        for purpose, old, new in zip((EXP_AVG_BITS, EXP_AVG_SQ_BITS), stored, moments, strict=False):
            for target, value, noise in zip(old, new, bits(purpose), strict=True):
                target.copy_(round_stochastically(value, noise, target.dtype))
        for target, value in zip(*(stored[2:] + moments[2:]), strict=True) if len(stored) == 3 else ():
            target.copy_(value)  # a maximum does not drift: to nearest
    if update.param.dtype != wide:
        noises = bits(PARAM_BITS) if update.master == "stochastic" else [None] * len(blocks)
        for param, extra, value, noise in zip(params, low, masters, noises, strict=True):
            if noise is not None:
                param.copy_(round_stochastically(value, noise, param.dtype))
            else:
                split_(value, param, extra)


def adamw_(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
           max_exp_avg_sqs: list[Tensor] | None = None, *, hyper: Hyper) -> None:
    """The arithmetic of one AdamW step on wide tensors, in place, as torch orders it."""
    if not params:
        return
    if hyper.decay != 1.0:
        torch._foreach_mul_(params, hyper.decay)
    torch._foreach_lerp_(exp_avgs, grads, hyper.weight1)
    torch._foreach_mul_(exp_avg_sqs, hyper.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, hyper.weight2)
    if max_exp_avg_sqs is not None:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
    roots = torch._foreach_sqrt(exp_avg_sqs if max_exp_avg_sqs is None else max_exp_avg_sqs)
    torch._foreach_div_(roots, hyper.root2)
    torch._foreach_add_(roots, hyper.eps)
    torch._foreach_addcdiv_(params, exp_avgs, roots, -hyper.step_size)


def head_grad_norm(updates: Sequence[Update]) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone, a float64 scalar.

    Squares are summed in float32 within a block and in float64 across blocks, always in the
    same order. Raises nothing; a NaN or Inf in a selected gradient shows in the result.
    """
    norms = [
        torch.linalg.vector_norm(block.of(u.grad) if block is not None else u.grad,
                                 dtype=torch.float64 if u.grad.dtype == torch.float64 else torch.float32)
        for u in updates for _, blocks in u.parts() for block in blocks if u.grad.numel()
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]))
