"""What one AdamW step takes for each parameter: the arguments of `head_adamw_`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..placement import is_sharded, local


class Block(NamedTuple):
    """A rectangle of a parameter that trains, and where its state lies in the compact state.

    Attributes:
        dim: the axis that is cut, 0 rows or 1 columns of the parameter seen as [shape[0], -1].
        start, stop: the half-open range along `dim`.
        offset: the position of its first element in the state.
        stride: elements of state from one of its rows to the next.
    """

    dim: int
    start: int
    stop: int
    offset: int
    stride: int

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a 2-D view of `tensor`, which has the parameter's shape."""
        return matrix(tensor).narrow(self.dim, self.start, self.stop - self.start)

    def of_state(self, compact: Tensor, shape: torch.Size) -> Tensor:
        """The block's state as a view [rows, cols] of a compact state tensor, [numel]."""
        return compact.as_strided(shape, (self.stride, 1), compact.storage_offset() + self.offset)


def matrix(tensor: Tensor) -> Tensor:
    """[shape[0], -1] as a view; vectors are [n, 1], scalars [1, 1]."""
    if tensor.ndim == 2:
        return tensor
    rows = tensor.shape[0] if tensor.ndim else 1
    return tensor.view(rows, tensor.numel() // max(rows, 1))


class Hyper(NamedTuple):
    """The numbers of one step of one parameter (or block), float64 on the host.

    With t the step that is being taken, c = 1 - beta^t:
    decay 1 - lr weight_decay, weight 1 - beta, root2 sqrt(c2), step_size lr / c1, sign -1 to
    maximize.
    """

    decay: float
    weight1: float
    beta2: float
    weight2: float
    root2: float
    eps: float
    step_size: float
    sign: float
    step: float

    @classmethod
    def of(cls, group: Mapping[str, Any], step: float) -> Hyper:
        """The numbers of step `step` (1, 2, ...), in the order in which torch computes them."""
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        return cls(1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5,
                   group["eps"], lr / (1 - beta1**step), -1.0 if group["maximize"] else 1.0, step)


def hypers_of(group: Mapping[str, Any], steps: Sequence[Tensor]) -> list[tuple[Hyper, ...] | Tensor]:
    """The numbers of the next step of some parameters of one group.

    Args:
        steps: for every parameter the steps taken, a scalar or [n]; on the CPU, or all on one
            device (`capturable`): then nothing waits for their values, and the numbers are a
            float64 tensor [n, len(Hyper)] per parameter.
    """
    counts = [step.numel() for step in steps]
    taken = torch.cat([step.reshape(-1) for step in steps])
    if taken.is_cuda:
        return list(_on_device(group, taken.double() + 1).split(counts))
    values = taken.tolist()
    known = {step: Hyper.of(group, step + 1) for step in set(values)}
    rows = iter(values)
    return [tuple(known[next(rows)] for _ in range(count)) for count in counts]


def _on_device(group: Mapping[str, Any], steps: Tensor) -> Tensor:
    """`Hyper.of` in tensor operations, one row for each of `steps` (float64)."""
    lr = group["lr"].to(steps) if isinstance(group["lr"], Tensor) else torch.full_like(steps, group["lr"])
    beta1, beta2 = map(float, group["betas"])
    ones = torch.ones_like(steps)
    return torch.stack([
        1 - ones * lr * group["weight_decay"], ones * (1 - beta1), ones * beta2, ones * (1 - beta2),
        (1 - beta2**steps).sqrt(), ones * group["eps"], lr / (1 - beta1**steps),
        -ones if group["maximize"] else ones, steps,
    ], 1)


@dataclass(eq=False)
class Update:
    """One parameter of one step; kept for the next one, which changes `hypers` and perhaps nothing else.

    Attributes:
        name: for errors.
        param, grad: same shape; outside the blocks neither is read or written. Of DTensors, here
            and in the state, the shards of this rank are taken.
        blocks: what trains; None: the whole parameter, and state of the parameter's shape.
        exp_avg, exp_avg_sq, max_exp_avg_sq: the state; the last only with amsgrad.
        state: where the optimizer keeps these tensors.
        owner, sharded: the parameter as the optimizer knows it; whether `param` is a shard of it.
        low: what 16 bits of the parameter do not hold: int16 for "split", of the parameter's
            dtype for "kahan", None otherwise.
        master: None, "split", "kahan" or "stochastic"; only where the parameter has 16 bits.
        hypers: one for all blocks, or one for each; a float64 tensor [n, len(Hyper)] where
            only the device knows the step.
        stream: which stream of random bits is this parameter's.
    """

    name: str
    param: Tensor
    grad: Tensor
    blocks: tuple[Block, ...] | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    low: Tensor | None
    master: str | None
    hypers: tuple[Hyper, ...] | Tensor
    stream: int
    state: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.owner, self.sharded = self.param, is_sharded(self.param)
        if self.sharded:
            self.param, self.grad = local(self.param), local(self.grad)
            self.exp_avg, self.exp_avg_sq = local(self.exp_avg), local(self.exp_avg_sq)
            self.max_exp_avg_sq, self.low = (t if t is None else local(t) for t in (self.max_exp_avg_sq, self.low))
        self.addresses = (self.param.data_ptr(), self.grad.data_ptr())
        self._grad = weakref.ref(self.grad)

    def release(self) -> None:
        """Forget the gradient, so that `zero_grad` frees its memory."""
        self.grad = None

    def holds(self, grad: Tensor, amsgrad: bool) -> bool:
        """The tensors are still these, where they were; then the gradient is taken up again."""
        state = self.state
        if self.sharded:
            if local(self.owner) is not self.param:
                return False
            grad, state = local(grad), {key: local(value) for key, value in state.items()}
        if (grad is not self._grad() or state.get("exp_avg") is not self.exp_avg
                or state.get("exp_avg_sq") is not self.exp_avg_sq
                or state.get("max_exp_avg_sq") is not self.max_exp_avg_sq or amsgrad == (self.max_exp_avg_sq is None)
                or state.get("master_lo", state.get("kahan")) is not self.low
                or self.addresses != (self.param.data_ptr(), grad.data_ptr())):
            return False
        self.grad = grad
        return True

    @cached_property
    def launch(self) -> tuple:
        """What tensors share that share a launch."""
        return (self.param.device, self.param.dtype, self.grad.dtype, self.exp_avg.dtype, self.master,
                self.max_exp_avg_sq is not None)

    @cached_property
    def launchable(self) -> bool:
        """The kernel can address it: contiguous where all of it trains, else with contiguous rows."""
        tensors = (self.param, self.grad)
        if torch.float64 in (self.param.dtype, self.grad.dtype):
            return False
        if self.blocks is None:
            return all(t.is_contiguous() for t in tensors)
        return all(t.is_contiguous() or t.ndim == 1 or (t.ndim == 2 and t.stride(1) == 1) for t in tensors)

    @property
    def n_hypers(self) -> int:
        return len(self.hypers)

    def parts(self) -> list[tuple[Hyper, list[Block | None]]]:
        """The blocks that share their numbers, None for the whole parameter."""
        blocks = list(self.blocks) if self.blocks is not None else [None]
        hypers = self.hypers
        if isinstance(hypers, Tensor):
            hypers = tuple(Hyper(*row) for row in hypers.tolist())
        if len(hypers) == 1:
            return [(hypers[0], blocks)]
        return [(hyper, [block]) for hyper, block in zip(hypers, blocks, strict=True)]
