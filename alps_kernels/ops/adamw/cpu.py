"""What `head_adamw_` means, in plain PyTorch: the CPU backend, and the oracle of the kernel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .codes8 import decode8, encode8, encode8_stochastically
from .param_update import Block, Hyper, Numbers, Update
from .rounding import join, random_bits, round_stochastically, split
from .tables import n_scales

PARAM_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = range(3)  # which rounding a random number is for
PENDING = 2**20  # bytes of new values that wait for one another: they stay in the cache


@torch.no_grad()
def head_adamw_(updates: Sequence[Update], numbers: Numbers, *, control: Tensor | None = None, seed: int = 0) -> None:
    """One AdamW step on the selected blocks of many parameters, in place.

        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)
        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2

    In the order of operations of torch.optim.AdamW's single-tensor path, so that float32
    parameters come out bit-equal to it. 16-bit parameters and 16- and 8-bit moments are widened
    to float32 and rounded once, at the end. A mirror receives what its parameter does.

    Everything is computed before anything is written, and written by one call, each parameter's
    `step` with it: an error or an interrupt on the way finds all of it done or nothing. Above
    `PENDING` bytes that holds for a run of parameters at a time.

    Args:
        updates: any mixture of dtypes, devices and precisions.
        numbers: of this step.
        control: [2] float32: gradients are multiplied by the first number; nothing moves where
            the second is not zero.
        seed: of stochastic rounding.
    """
    if control is not None and control[1] != 0:
        return
    scale = 1.0 if control is None else control[0].item()
    targets, values, steps, pending = [], [], [], 0
    for update in updates:
        for hyper, blocks in update.parts(numbers):
            for target, value in _stepped(update, hyper, blocks, scale, seed):
                targets.append(target)
                values.append(value)
                pending += value.nbytes
        steps += [update.step] if update.step is not None else []
        if pending > PENDING:
            _write(targets, values, steps)
            targets, values, steps, pending = [], [], [], 0
    _write(targets, values, steps)


def _write(targets: list[Tensor], values: list[Tensor], steps: list[Tensor]) -> None:
    """Everything in one call, which nothing interrupts."""
    if targets or steps:
        torch._foreach_copy_([*targets, *steps], [*values, *(torch._foreach_add(steps, 1) if steps else ())])


def _stepped(update: Update, hyper: Hyper, blocks: list[Block | None], scale: float,
             seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a step of some blocks writes: (where, the new values)."""
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
    scales = [_scales(update, tensor, blocks) for tensor in update.scales or ()]
    low = state(update.low) if update.low is not None else [None] * len(blocks)
    masters = [join(p, extra) for p, extra in zip(params, low, strict=True)]
    grads = [g.to(wide) if scale * hyper.sign == 1.0 else g.to(wide) * (scale * hyper.sign) for g in grads]
    if scales:
        moments = [[decode8(*pair) for pair in zip(*both, strict=True)] for both in zip(stored, scales, strict=True)]
    else:
        moments = [[t.to(wide) for t in tensors] for tensors in stored]
    masters, *moments = adamw(masters, grads, *moments, hyper=hyper)

    purposes = (EXP_AVG_BITS, EXP_AVG_SQ_BITS, None)[:len(stored)]  # a maximum does not drift: to nearest
    for index, (purpose, old, new) in enumerate(zip(purposes, stored, moments, strict=True)):
        exact = purpose is None or update.exp_avg.dtype == wide or (scales and purpose == EXP_AVG_BITS)
        noises = [None] * len(old) if exact else bits(purpose)
        for at, (target, value, noise) in enumerate(zip(old, new, noises, strict=True)):
            if scales:
                codes, scale_of = encode8(value) if purpose == EXP_AVG_BITS else encode8_stochastically(value, noise)
                yield target, codes
                yield scales[index][at], scale_of
            else:
                yield target, value if noise is None else round_stochastically(value, noise, target.dtype)
    noises = bits(PARAM_BITS) if update.master == "stochastic" else [None] * len(blocks)
    for block, param, extra, value, noise in zip(blocks, params, low, masters, noises, strict=True):
        if noise is not None:
            value = round_stochastically(value, noise, param.dtype)
        elif param.dtype != wide:
            value, rest = split(value, param.dtype, None if extra is None else extra.dtype)
            if extra is not None:
                yield extra, rest
        yield param, value
        if update.mirror is not None:
            yield block.of_mirror(update.mirror), value


def _scales(update: Update, tensor: Tensor, blocks: list[Block | None]) -> list[Tensor]:
    """The scales of each of `blocks`, views."""
    if update.blocks is None:
        return [tensor]
    parts = tensor.split([n_scales(block, update.param) for block in update.blocks])
    return [part for block, part in zip(update.blocks, parts, strict=True) if block in blocks]


def adamw(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
          max_exp_avg_sqs: list[Tensor] | None = None, *, hyper: Hyper) -> list[Sequence[Tensor]]:
    """The arithmetic of one AdamW step on wide tensors, as torch orders it: the new params and moments."""
    if not params:
        return [params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs][:3 if max_exp_avg_sqs is None else 4]
    params = torch._foreach_mul(params, hyper.decay)
    exp_avgs = torch._foreach_lerp(exp_avgs, grads, hyper.weight1)
    exp_avg_sqs = torch._foreach_mul(exp_avg_sqs, hyper.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, hyper.weight2)
    if max_exp_avg_sqs is not None:
        max_exp_avg_sqs = torch._foreach_maximum(max_exp_avg_sqs, exp_avg_sqs)
    roots = torch._foreach_sqrt(exp_avg_sqs if max_exp_avg_sqs is None else max_exp_avg_sqs)
    torch._foreach_div_(roots, hyper.root2)
    torch._foreach_add_(roots, hyper.eps)
    torch._foreach_addcdiv_(params, exp_avgs, roots, -hyper.step_size)
    return [params, exp_avgs, exp_avg_sqs] + ([] if max_exp_avg_sqs is None else [max_exp_avg_sqs])


def head_grad_norm(updates: Sequence[Update]) -> Tensor:
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
