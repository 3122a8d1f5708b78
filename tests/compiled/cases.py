"""The launches that the host makes, recorded from its own code: every variant of every kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import tables as delta_tables
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam

from ..optim.cases import bind, make, sliced_module
from ..support.launches import Launch, recorded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "8bit": "8bit"}


class Variant(NamedTuple):
    """A variant of the optimizer's kernel."""

    param: str
    moment: str
    master: str | None
    amsgrad: bool
    weight_copy: bool
    bytes: float  # of an element, as the kernel's docstring states them


VARIANTS = [Variant(*row) for row in (
    ("fp32", "fp32", None, False, False, 28),
    ("fp32", "fp32", None, True, False, 36),
    ("fp32", "bf16", None, False, False, 20),
    ("bf16", "fp32", None, False, False, 22),
    ("bf16", "fp32", None, False, True, 24),
    ("bf16", "fp32", "split", False, False, 26),
    ("bf16", "fp32", "split", False, True, 28),
    ("bf16", "fp32", "kahan", False, False, 26),
    ("bf16", "fp32", "stochastic", False, False, 22),
    ("bf16", "bf16", "split", False, False, 18),
    ("bf16", "bf16", "stochastic", True, False, 18),
    ("fp16", "fp32", "split", True, False, 34),
    ("fp16", "bf16", "stochastic", False, False, 14),
    ("bf16", "8bit", "split", False, False, 14.25),
    ("bf16", "8bit", "stochastic", False, True, 12.25),
    ("fp16", "8bit", "split", False, False, 14.25),
    ("fp32", "8bit", None, False, False, 16.25),
)]
PLAIN, SPLIT, QUANTISED = VARIANTS[0], VARIANTS[6], VARIANTS[13]  # of float32 weights, of 16 bits, with 8-bit moments
# Columns of a weight: at multiples of 8, where accesses of 16 bytes are possible, and at odd places.
COLUMNS = {True: ((0, 128), (256, 384)), False: ((3, 64), (129, 190))}
# What a launch of the scoring kernels is over: whole tiles that lie flat; rows that end in a part of a tile, at multiples
# of 16 or at odd places; transposed weights, as those of a Conv1D.
LAYOUTS = ("flat", "tail", "odd", "transposed")
WANTED = {"all": [name for name in METRICS if name != "pad_values"], "pad": ["pad"]}


def step_of(variant: Variant, aligned: bool = True, everything: bool = True) -> Callable[[], object]:
    """`HeadAdamW.step` of a new optimizer with the kernel's backend.

    Args:
        aligned: the selected columns begin and end at multiples of 8.
        everything: with clipping, and under a GradScaler whose decision the host does not read; else with neither.
    """
    dtype = DTYPES[variant.param]
    options = {"master": variant.master, "moment_dtype": DTYPES[variant.moment], "amsgrad": variant.amsgrad}
    if everything:
        options |= {"max_grad_norm": 1.0, "capturable": True}
    weight = torch.zeros(64, 512, dtype=dtype)
    if variant.weight_copy:
        module = sliced_module(weight, 1, COLUMNS[aligned])
        param = module.weight_slice
        optimizer = HeadAdamW([param], **options)
        optimizer.module = module  # else it is freed, and its weight with it
    else:
        param = nn.Parameter(weight)
        optimizer = make({"w": param}, bind(BoundParam("w", param, 1, COLUMNS[aligned])), **options)
    optimizer._backend = "triton"
    param.grad = torch.zeros_like(param)
    if everything:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    return optimizer.step


def score_of(base: str = "bf16", task: str | None = None, layout: str = "flat",
             metrics: str = "all") -> Callable[[], object]:
    """`head_delta` of two heads, with the kernels."""
    shape = {"flat": (64, 96), "tail": (40, 144), "odd": (40, 145), "transposed": (64, 96)}[layout]
    pair = [torch.zeros(2, *shape, dtype=DTYPES[name]) for name in (base, task or base)]
    if layout == "transposed":
        pair = [side.mT for side in pair]
    return lambda: head_delta([[Segment(*pair, (0, 1))]], WANTED[metrics], backend="triton")


def projection_of(base: str = "bf16", d_k: int = 128, d_v: int = 128, metrics: str = "all", task: str | None = None,
                  d_model: int = 4096, first: int = 0) -> Callable[[], object]:
    """`head_delta_projection` of two heads, with the kernels; `first`: elements ahead of each weight in its memory."""
    layer = tuple(Segment(*(torch.zeros(first + 2 * size * d_model, dtype=DTYPES[name])[first:].view(2, size, d_model)
                            for name in (base, task or base)), (0, 1)) for size in (d_k, d_k, d_v))
    return lambda: head_delta_projection([layer], WANTED[metrics], backend="triton")


def step_launches(variant: Variant, aligned: bool = True, everything: bool = True,
                  target: str = "sm_90") -> dict[str, Launch]:
    """The launches of one step on a GPU of this vendor, by kernel."""
    return _step_launches(variant, aligned, everything, "gfx942" if target.startswith("gfx") else "sm_90")


@functools.cache
def _step_launches(variant: Variant, aligned: bool, everything: bool, target: str) -> dict[str, Launch]:
    return launches_of(step_of(variant, aligned, everything), target)


@functools.cache
def score_launches(target: str, *case: str, **options: str) -> dict[str, Launch]:
    """The launches of `score_of(*case)` on a GPU of this vendor, by kernel."""
    return launches_of(score_of(*case, **options), target)


@functools.cache
def projection_launches(target: str, *case: object, **options: object) -> dict[str, Launch]:
    """The launches of `projection_of(*case)` on a GPU of this vendor, by kernel."""
    return launches_of(projection_of(*case, **options), target)


def launches_of(run: Callable[[], object], target: str) -> dict[str, Launch]:
    lanes = 64 if target.startswith("gfx") else 32  # as the module has it where torch is of that vendor
    with mock.patch.object(delta_tables, "LANES", lanes), recorded(target) as launches:
        run()
    found = {launch.name: launch for launch in launches}
    assert len(found) == len(launches), [launch.name for launch in launches]
    return found
