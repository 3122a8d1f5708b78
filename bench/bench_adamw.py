"""The optimizer step: ours beside torch's AdamW with a gradient mask, and others' on a dense tensor of the same size.

    python -m bench.bench_adamw [--shape NAME ...] [--ratio R ...] [--layers N] [--dtype float32|bfloat16]

The attention weights (q, k, v, o) of a model's shape; selected heads scattered over the model or
the first ones of every layer; a key/value group trains when one of its query heads does. The
masked baseline is what users write today: the gradient times a mask, then torch.optim.AdamW over all
attention weights (which also decays what is frozen). The dense baselines get one tensor of as many
elements as are selected, which is the best that any optimizer could be given. Bytes are 3 times the
weight's size (param read and written, grad read) plus twice the state that the optimizer holds.

On a GPU there are also rows of kernels alone: GPU time without the host's (`bench.kernels`), of the step with one
and two tiles a program, and of a captured graph of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundSelection
from bench import timing
from bench.attention import DEVICE, Selected, attention, bound_to, masks_of, sweep
from bench.baselines import BASELINES, OPTIONS, baseline
from bench.common import gate
from bench.counting import state_bytes
from bench.kernels import alone, captured, gpu_time, replay_time, with_tiles
from bench.shapes import Shape
from bench.timing import Timed, timed_rows

OURS = "HeadAdamW"
ALONE = "kernels alone"  # what the names of those rows end in
TILES = (1, 2)  # tiles that a program of the step takes, one after the other
# The default first: split masters of 16-bit weights and float32 moments. float32 weights have no masters.
PRECISIONS = ({}, {"master": "stochastic"}, {"master": None}, {"moment_dtype": torch.bfloat16},
              {"moment_dtype": "8bit"})


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


def masked(params: dict[str, nn.Parameter], bound: BoundSelection, kind: str, **options) -> Timed:
    """The gradient times a mask, then torch's AdamW over all attention weights."""
    optimizer = torch.optim.AdamW(params.values(), **OPTIONS, **options, **{kind: True})
    masks = list(masks_of(params, bound).values())

    def call() -> None:
        torch._foreach_mul_([p.grad for p in params.values()], masks)
        optimizer.step()

    total = sum(p.numel() for p in params.values())
    size = params["0.q"].element_size()
    return Timed(call, lambda: moved(optimizer, total, size, 3 * size, "over all attention weights"))


def flat_param(bound: BoundSelection, dtype: torch.dtype) -> nn.Parameter:
    """One tensor of as many elements as are selected, with a gradient."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    flat = nn.Parameter((0.02 * torch.randn(bound.numel, generator=generator, device=DEVICE)).to(dtype))
    flat.grad = (1e-3 * torch.randn(bound.numel, generator=generator, device=DEVICE)).to(dtype)
    return flat


def dense(name: str, bound: BoundSelection, dtype: torch.dtype) -> Timed:
    """A baseline on one tensor of as many elements as are selected."""
    flat = flat_param(bound, dtype)
    optimizer = baseline(name, [flat])
    return Timed(optimizer.step, lambda: moved(optimizer, flat.numel(), flat.element_size()))


def ours_dense(bound: BoundSelection, dtype: torch.dtype) -> Timed:
    """HeadAdamW on that tensor, which trains whole."""
    flat = flat_param(bound, dtype)
    optimizer = HeadAdamW([flat], **OPTIONS)
    return Timed(optimizer.step, lambda: moved(optimizer, flat.numel(), flat.element_size()))


def kernels_of(build: Callable[..., Timed], *arguments, **named) -> Timed:
    """The Triton kernels of one of our steps, without the rest of it."""
    whole = build(*arguments, **named)
    return alone(whole.call, whole.facts)


def retiled(tiles: int, params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    """The step's kernel with this many tiles a program."""
    whole = ours(params, bound)
    return alone(whole.call, whole.facts, with_tiles(tiles))


def in_graph(params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    """A captured graph of the whole step, replayed: the device counts steps."""
    optimizer = HeadAdamW(params.values(), heads=bound, capturable=True, **OPTIONS)
    graph = captured(optimizer.step)

    def facts() -> dict:  # which keeps the optimizer alive as long as the graph
        row = moved(optimizer, bound.numel, params["0.q"].element_size())
        return {**row, "note": f"{row['note']}, GPU time of a replay"}

    return Timed(graph.replay, facts, replay_time)


def fused_dense(bound: BoundSelection, dtype: torch.dtype) -> Timed:
    """The GPU time of torch's fused AdamW on that tensor."""
    flat = flat_param(bound, dtype)
    optimizer = torch.optim.AdamW([flat], fused=True, capturable=True, **OPTIONS)
    return Timed(optimizer.step, lambda: moved(optimizer, flat.numel(), flat.element_size()), gpu_time)


def fused_masked(params: dict[str, nn.Parameter], bound: BoundSelection) -> Timed:
    """The GPU time of the mask and torch's fused AdamW over all attention weights."""
    whole = masked(params, bound, "fused", capturable=True)
    return Timed(whole.call, whole.facts, gpu_time)


def copies(bound: BoundSelection, dtype: torch.dtype) -> Timed:
    """A copy that moves the bytes of our step, half read and half written."""
    size = bound.numel * (26 if dtype.itemsize == 2 else 28) // 2
    source = torch.randint(256, (size,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return Timed(lambda: target.copy_(source), lambda: {"bytes": 2 * size, "note": "as many bytes as the step moves"},
                 gpu_time)


def moved(optimizer: torch.optim.Optimizer, numel: int, size: int, mask: int = 0, note: str = "") -> dict:
    """Bytes a step must move: param read and written, grad read, state read and written; a mask's own on top."""
    state = state_bytes(optimizer)
    per_element = 3 * size + 2 * state / numel + mask
    return {"bytes": round(numel * per_element),
            "note": ", ".join(filter(None, (f"{per_element:.1f} B an element", note)))}


def builders_of(params: dict[str, nn.Parameter], bound: BoundSelection,
                dtype: torch.dtype) -> dict[str, Callable[[], Timed]]:
    """Ours in the default precision first: every ratio refers to it. Then what the targets are about, then the rest."""
    kinds = {f"{OURS} {describe(kind)}".strip(): kind for kind in PRECISIONS
             if dtype != torch.float32 or "master" not in kind}
    builders: dict[str, Callable[[], Timed]] = {
        name: partial(ours, params, bound, **kind) for name, kind in kinds.items()}
    builders |= {f"torch AdamW {kind} + mask": partial(masked, params, bound, kind) for kind in ("fused", "foreach")}
    builders |= {f"{OURS}, dense": partial(ours_dense, bound, dtype)}
    builders |= {f"{name}, dense": partial(dense, name, bound, dtype) for name in BASELINES}
    if not timing.CUDA:
        return builders
    first = {OURS: builders.pop(OURS), **kernel_builders(params, bound, dtype)}
    first |= {name: builders.pop(name) for name in ("torch AdamW fused + mask", f"{OURS}, dense") if name in builders}
    rest = {f"{name}, {ALONE}": partial(kernels_of, ours, params, bound, **kind)
            for name, kind in kinds.items() if kind}
    return first | builders | rest


def kernel_builders(params: dict[str, nn.Parameter], bound: BoundSelection,
                    dtype: torch.dtype) -> dict[str, Callable[[], Timed]]:
    """GPU time without the host's, the most wanted first."""
    builders = {
        f"{OURS}, {ALONE}": partial(kernels_of, ours, params, bound),
        "copy, dense": partial(copies, bound, dtype),
        f"{OURS}, dense, {ALONE}": partial(kernels_of, ours_dense, bound, dtype),
        f"torch AdamW fused, dense, {ALONE}": partial(fused_dense, bound, dtype),
        f"torch AdamW fused + mask, {ALONE}": partial(fused_masked, params, bound),
        f"{OURS}, captured graph": partial(in_graph, params, bound),
    }
    return builders | {f"{OURS}, TILES={n}, {ALONE}": partial(retiled, n, params, bound) for n in TILES}


def describe(precision: dict) -> str:
    return ", ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in precision.items())


def run(case: Selected, bandwidth: float, repeats: int) -> Iterator[dict]:
    return timed_rows(case.name, builders_of(case.params, case.bound, case.dtype), repeats, bandwidth)


def main(argv: list[str] | None = None) -> None:
    sweep(__doc__, "adamw", run, argv, parity)


if __name__ == "__main__":
    main()
