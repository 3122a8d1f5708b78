"""The meaning of `head_adamw_` and `head_grad_norm`: one block of one parameter after another, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .param_update import Block, GradControl, HyperRow, HyperTable, ParamUpdate
from .quantize8 import decode8, encode8, encode8_stochastically
from .rounding import EXP_AVG_BITS, EXP_AVG_SQ_BITS, PARAM_BITS, join_master, random_bits, round_stochastically, split


@torch.no_grad()
def head_adamw_(updates: Sequence[ParamUpdate], hypers: HyperTable, *, control: GradControl = GradControl(),
                seed: int = 0) -> None:
    """One AdamW step on the selected blocks of many parameters, in place."""
    factor = control.factor()
    for update in updates if not control.skips() else ():
        rows = hypers.of(update)
        for block in (None,) if update.blocks is None else update.blocks:
            step_block(update, block, rows[block.span if len(rows) > 1 else 0], factor, seed)
        if update.step is not None:
            update.step += 1


def step_block(update: ParamUpdate, block: Block | None, hyper: HyperRow, factor: float, seed: int) -> None:
    """One AdamW step on one block of a parameter, None: on all of it; c = 1 - beta^t.

        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)

    In the order of operations of torch.optim.AdamW's single-tensor path, so that float32
    parameters come out bit-equal to it. 16-bit parameters and 16- and 8-bit moments are widened
    to float32 and rounded once, at the end.
    """
    def of_block(state: Tensor | None) -> Tensor | None:
        return state if state is None or block is None else block.of_state(state, param.shape)

    def rounded(value: Tensor, purpose: int, dtype: torch.dtype) -> Tensor:
        return value if value.dtype == dtype else round_stochastically(value, noise(purpose), dtype)

    def noise(purpose: int) -> Tensor:
        bits = random_bits(update.exp_avg.numel(), seed, int(hyper.step), update.stream, purpose, param.device)
        return of_block(bits.view(update.exp_avg.shape))

    param, grad = (t if block is None else block.of(t) for t in (update.param, update.grad))
    low, exp_avg, exp_avg_sq = map(of_block, (update.low, update.exp_avg, update.exp_avg_sq))
    largest = of_block(update.max_exp_avg_sq)
    scales = [s if block is None else block.of_scales(s, param.shape) for s in update.scales or ()]
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    g = grad.to(wide) * (factor * hyper.sign)
    m = decode8(exp_avg, scales[0]) if scales else exp_avg.to(wide)
    v = decode8(exp_avg_sq, scales[1]) if scales else exp_avg_sq.to(wide)

    m = m.lerp(g, hyper.weight1)
    v = (v * hyper.beta2).addcmul(g, g, value=hyper.weight2)
    top = v if largest is None else torch.maximum(largest.to(wide), v)
    p = join_master(param, low) * hyper.decay
    p = p.addcdiv(m, top.sqrt() / hyper.root2 + hyper.eps, value=-hyper.step_size)

    if scales:
        codes = *encode8(m), *encode8_stochastically(v, noise(EXP_AVG_SQ_BITS))
        for stored, new in zip((exp_avg, scales[0], exp_avg_sq, scales[1]), codes, strict=True):
            stored.copy_(new)
    else:
        exp_avg.copy_(rounded(m, EXP_AVG_BITS, exp_avg.dtype))
        exp_avg_sq.copy_(rounded(v, EXP_AVG_SQ_BITS, exp_avg_sq.dtype))
    if largest is not None:
        largest.copy_(top)  # to nearest: a maximum does not drift
    if update.master == "stochastic":
        p = rounded(p, PARAM_BITS, param.dtype)
    else:
        p, rest = split(p, param.dtype, None if low is None else low.dtype)
        if low is not None:
            low.copy_(rest)
    param.copy_(p)
    if update.weight_copy is not None:
        block.of_copy(update.weight_copy).copy_(p)


def head_grad_norm(updates: Sequence[ParamUpdate]) -> Tensor:
    """The l2 norm of the gradients over the selected blocks alone, a float64 scalar."""
    grads = [u.grad if block is None else block.of(u.grad)
             for u in updates for block in (u.blocks if u.blocks is not None else (None,))]
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return sum((grad.double().square().sum().cpu() for grad in grads), zero).sqrt()
