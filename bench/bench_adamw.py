"""The optimizer step: ours beside torch's AdamW with a gradient mask, and others' on a dense tensor of the same size.

    python -m bench.bench_adamw [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The attention weights (q, k, v, o) of a model's shape; selected heads scattered over the model or
the first ones of every layer; a key/value group trains when one of its query heads does. The
masked baseline is what users write today: the gradient times a mask, then torch.optim.AdamW over all
attention weights (which also decays what is frozen). The dense baselines get one tensor of as many
elements as are selected, which is the best that any optimizer could be given. Bytes are 3 times the
weight's size (param read and written, grad read) plus twice the state that the optimizer holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundSelection
from bench.attention import DEVICE, Selected, attention, bound_to, masks_of, sweep
from bench.baselines import BASELINES, OPTIONS, baseline
from bench.common import gate
from bench.counting import state_bytes
from bench.shapes import Shape
from bench.timing import Timed, rows_of, time_each

OURS = "HeadAdamW"
# The default first: split masters of 16-bit weights and float32 moments. float32 weights have no masters.
PRECISIONS = ({}, {"master": "stochastic"}, {"master": None}, {"moment_dtype": torch.bfloat16}, {"moment_dtype": "8bit"})


def parity() -> None:
    """float32 slices against torch's AdamW on them alone, 10 steps; every other byte as it was."""
    shape = Shape("tiny", 2, 96, 6, 2, 16)
    params = attention(shape, 2, torch.float32)
    bound = bound_to(shape, params, [(0, 1), (0, 2), (1, 5)])
    before = {name: p.detach().clone() for name, p in params.items()}
    cuts = [nn.Parameter(part.cut(part.param.detach()).clone()) for part in bound.params]
    ours, theirs = HeadAdamW(params.values(), heads=bound, **OPTIONS), torch.optim.AdamW(cuts, **OPTIONS)
    for _ in range(10):
        for part, cut in zip(bound.params, cuts, strict=True):
            cut.grad = part.cut(part.param.grad)
        ours.step()
        theirs.step()
    worst = max(((part.cut(part.param.detach()) - cut).abs().max() / 2.0**-24).item()
                for part, cut in zip(bound.params, cuts, strict=True))
    masks = masks_of(params, bound)
    frozen = all(torch.equal(params[n][masks[n] == 0], before[n][masks[n] == 0]) for n in params)
    gate("the sliced step", worst <= 2 and frozen,
         f"largest difference {worst:.1f} x 2^-24, frozen bytes {'kept' if frozen else 'MOVED'}")


def ours(params: dict[str, nn.Parameter], bound: BoundSelection, **precision) -> Timed:
    optimizer = HeadAdamW(params.values(), heads=bound, **precision, **OPTIONS)
    return Timed(optimizer.step, lambda: moved(optimizer, bound.numel, params["0.q"].element_size()))


def masked(params: dict[str, nn.Parameter], bound: BoundSelection, kind: str) -> Timed:
    """The gradient times a mask, then torch's AdamW over all attention weights."""
    optimizer = torch.optim.AdamW(params.values(), **OPTIONS, **{kind: True})
    masks = list(masks_of(params, bound).values())

    def call() -> None:
        torch._foreach_mul_([p.grad for p in params.values()], masks)
        optimizer.step()

    total = sum(p.numel() for p in params.values())
    size = params["0.q"].element_size()
    return Timed(call, lambda: moved(optimizer, total, size, 3 * size, "over all attention weights"))


def dense(name: str, bound: BoundSelection, dtype: torch.dtype) -> Timed:
    """A baseline on one tensor of as many elements as are selected."""
    flat = nn.Parameter(torch.zeros(bound.numel, dtype=dtype, device=DEVICE))
    flat.grad = torch.ones_like(flat)
    optimizer = baseline(name, [flat])
    return Timed(optimizer.step, lambda: moved(optimizer, flat.numel(), flat.element_size()))


def moved(optimizer: torch.optim.Optimizer, numel: int, size: int, mask: int = 0, note: str = "") -> dict:
    """Bytes a step must move: param read and written, grad read, state read and written; a mask's own on top."""
    state = state_bytes(optimizer)
    per_element = 3 * size + 2 * state / numel + mask
    return {"bytes": round(numel * per_element),
            "note": ", ".join(filter(None, (f"{per_element:.1f} B an element", note)))}


def builders_of(params: dict[str, nn.Parameter], bound: BoundSelection,
                dtype: torch.dtype) -> dict[str, Callable[[], Timed]]:
    """Ours first, the default precision above all: every ratio refers to it."""
    kinds = [kind for kind in PRECISIONS if dtype != torch.float32 or "master" not in kind]
    builders = {f"{OURS} {describe(kind)}".strip(): partial(ours, params, bound, **kind) for kind in kinds}
    builders |= {f"torch AdamW {kind} + mask": partial(masked, params, bound, kind) for kind in ("foreach", "fused")}
    return builders | {f"{name}, dense": partial(dense, name, bound, dtype) for name in BASELINES}


def describe(precision: dict) -> str:
    return ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in precision.items())


def run(case: Selected, bandwidth: float, repeats: int) -> list[dict]:
    timings = time_each(builders_of(case.params, case.bound, case.dtype), repeats)
    return rows_of(case.name, timings, bandwidth)


def main(argv: list[str] | None = None) -> None:
    sweep(__doc__, "adamw", run, argv, parity)


if __name__ == "__main__":
    main()
