"""The CPU backend of `head_adamw_`: everything is computed before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .param_update import Block, GradControl, HyperRow, HyperTable, ParamUpdate
from .quantize8 import decode8, encode8, encode8_stochastically
from .rounding import EXP_AVG_BITS, EXP_AVG_SQ_BITS, PARAM_BITS, join_master, random_bits, round_stochastically, split

PENDING = 2**20  # bytes of new values that wait for one another: they stay in the cache


@torch.no_grad()
def head_adamw_(updates: Sequence[ParamUpdate], hypers: HyperTable, *, control: GradControl = GradControl(),
                seed: int = 0) -> None:
    """One AdamW step, in place.

    Everything is computed before anything is written, and written by one call, each parameter's
    `step` with it: an error or an interrupt on the way finds all of it done or nothing. Above
    `PENDING` bytes that holds for a run of parameters at a time.
    """
    if control.skips():
        return
    factor, pairs, pending = control.factor(), [], 0
    for update in updates:
        first = len(pairs)
        pairs += new_values(update, hypers, factor, seed)
        pending += sum([pair[1].nbytes for pair in pairs[first:]])
        if pairs and (pending > PENDING or update is updates[-1]):
            torch._foreach_copy_(*zip(*pairs, strict=True))  # in one call, which nothing interrupts
            pairs, pending = [], 0


def new_values(update: ParamUpdate, hypers: HyperTable, factor: float, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a step of one parameter writes, block after block: (a place, its new values)."""
    blocks = (None,) if update.blocks is None else update.blocks
    rows, drawn = hypers.of(update), {}

    def bits(step: float, purpose: int) -> Tensor:
        if (step, purpose) not in drawn:  # once for all blocks
            drawn[step, purpose] = random_bits(update.exp_avg.numel(), seed, int(step), update.stream, purpose,
                                               update.param.device).view(update.exp_avg.shape)
        return drawn[step, purpose]

    for block in blocks:
        yield from _new_values(update, block, rows[block.span if len(rows) > 1 else 0], factor, bits)
    if update.step is not None:
        yield update.step, update.step + 1


def _new_values(update: ParamUpdate, block: Block | None, hyper: HyperRow, factor: float,
                bits: Callable[[float, int], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    param, grad = (t if block is None else block.of(t) for t in (update.param, update.grad))
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32

    def part(state: Tensor | None) -> Tensor | None:
        return state if state is None or block is None else block.of_state(state, param.shape)

    def rounded(x: Tensor, purpose: int, dtype: torch.dtype) -> Tensor:
        return x if dtype == wide else round_stochastically(x, part(bits(hyper.step, purpose)), dtype)

    scales = [s if block is None else block.of_scales(s, param.shape) for s in update.scales or ()]
    low, m, v, v_max = map(part, (update.low, update.exp_avg, update.exp_avg_sq, update.max_exp_avg_sq))
    wide_m, wide_v = (decode8(m, scales[0]), decode8(v, scales[1])) if scales else (m.to(wide), v.to(wide))
    grad = grad.to(wide) if factor * hyper.sign == 1 else grad.to(wide) * (factor * hyper.sign)
    master, wide_m, wide_v, wide_max = adamw(join_master(param, low), grad, wide_m, wide_v,
                                             None if v_max is None else v_max.to(wide), hyper)
    if scales:
        places = m, scales[0], v, scales[1]
        codes = *encode8(wide_m), *encode8_stochastically(wide_v, part(bits(hyper.step, EXP_AVG_SQ_BITS)))
        yield from zip(places, codes, strict=True)
    else:
        yield m, rounded(wide_m, EXP_AVG_BITS, m.dtype)
        yield v, rounded(wide_v, EXP_AVG_SQ_BITS, v.dtype)
    if v_max is not None:
        yield v_max, wide_max  # to nearest: a maximum does not drift
    if update.master == "stochastic":
        value = rounded(master, PARAM_BITS, param.dtype)
    else:
        value, rest = split(master, param.dtype, None if low is None else low.dtype)
        if low is not None:
            yield low, rest
    yield param, value
    if update.weight_copy is not None:
        yield block.of_copy(update.weight_copy), value


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, v_max: Tensor | None, hyper: HyperRow) -> tuple:
    """The new parameter and moments, all of one float dtype; the formula is that of `oracle.step_block`."""
    p = p * hyper.decay
    m = m.lerp(g, hyper.weight1)
    v = (v * hyper.beta2).addcmul_(g, g, value=hyper.weight2)
    v_max = None if v_max is None else torch.maximum(v_max, v)
    root = (v if v_max is None else v_max).sqrt().div_(hyper.root2).add_(hyper.eps)
    return p.addcdiv_(m, root, value=-hyper.step_size), m, v, v_max


@torch.no_grad()
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
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]))
