"""What one AdamW step takes of each parameter, and its hyperparameters: the arguments of `head_adamw_`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tensors import as_matrix, is_sharded, local_part
from .quantize8 import n_scales


class Block(NamedTuple):
    """A rectangle of a parameter that trains, and where its state lies in the compact state.

    Attributes:
        dim: the axis that is cut, 0 rows or 1 columns of the parameter seen as [shape[0], -1].
        start, stop: the half-open range along `dim`.
        offset: the position of its first element in the state.
        stride: elements of state from one of its rows to the next.
        span: which of the parameter's step counts is its.
        copy_start: where along `dim` the block begins in `ParamUpdate.weight_copy`.
        scale: the first of its scales, where moments have 8 bits.
    """

    dim: int
    start: int
    stop: int
    offset: int
    stride: int
    span: int = 0
    copy_start: int = 0
    scale: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a 2-D view of `tensor`, which has the parameter's shape."""
        return as_matrix(tensor).narrow(self.dim, self.start, self.stop - self.start)

    def of_copy(self, weight: Tensor) -> Tensor:
        """The block's place in the synchronised copy, a 2-D view."""
        return as_matrix(weight).narrow(self.dim, self.copy_start, self.stop - self.start)

    def of_state(self, compact: Tensor, shape: torch.Size) -> Tensor:
        """The block's state as a view [rows, cols] of a compact state tensor, [numel]."""
        return compact.as_strided(shape, (self.stride, 1), compact.storage_offset() + self.offset)

    def of_scales(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """The block's scales, a view."""
        return scales.narrow(0, self.scale, n_scales(shape.numel()))


class HyperRow(NamedTuple):
    """The hyperparameters of one step of one parameter (or block), float64 on the host.

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
    def of(cls, group: Mapping[str, Any], step: float) -> HyperRow:
        """Those of step `step` (1, 2, ...), in the order in which torch computes them."""
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        return cls(1 - lr * group["weight_decay"], 1 - beta1, beta2, 1 - beta2, (1 - beta2**step) ** 0.5,
                   group["eps"], lr / (1 - beta1**step), -1.0 if group["maximize"] else 1.0, step)


@dataclass
class HyperTable:
    """The hyperparameters of one step, of all its parameters; `ParamUpdate.row` says which are whose.

    Attributes:
        rows: of parameters whose step the host counts.
        on_device: float64 [n, len(HyperRow)], of those whose step only their device counts (`capturable`); with the
            inverse of root2, as the kernel reads it.
    """

    rows: list[HyperRow] = field(default_factory=list)
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def of(self, update: ParamUpdate) -> list[HyperRow]:
        """A parameter's rows; waits for its device where that counts."""
        rows = slice(update.row, update.row + update.n_rows)
        if not update.counts_on_device:
            return self.rows[rows]
        return [HyperRow(*row)._replace(root2=1 / row[HyperRow._fields.index("root2")])
                for row in self.on_device[update.param.device][rows].tolist()]


class GradControl(NamedTuple):
    """What a step does with the gradients first. Each tensor holds one number, on any device.

    Attributes:
        grad_scale: they are divided by it; None: by 1.
        norm: the l2 norm of the unscaled gradients, to clip them; None: they are not clipped.
        max_norm: the norm to which they are clipped.
        found_inf: where it is not zero, nothing moves; None: everything does.
    """

    grad_scale: Tensor | None = None
    norm: Tensor | None = None
    max_norm: float = 0.0
    found_inf: Tensor | None = None

    def skips(self) -> bool:
        """Nothing may move; waits for the device."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def factor(self) -> float:
        """What every gradient is multiplied by; waits for the device."""
        factor = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        if self.norm is None:
            return factor
        clip = self.max_norm / (float(self.norm) + 1e-6)
        return factor if clip >= 1 else factor * clip  # a NaN stays one

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
        """(norm float64, grad_scale and found_inf float32, max_norm), as the kernels take them."""
        if self.norm is None and self.grad_scale is None and self.found_inf is None:
            return None, None, None, 0.0
        moved = [t if t is None or (t.device == device and t.dtype == dtype) else t.to(device, dtype) for t, dtype in (
            (self.norm, torch.float64), (self.grad_scale, torch.float32), (self.found_inf, torch.float32))]
        return *moved, float(self.max_norm)


def counted(found_inf: Tensor | None, like: Tensor) -> Tensor | int:
    """What a step adds to step counts like this one: 1, or 0 where `found_inf` is not zero."""
    return 1 if found_inf is None else (found_inf == 0).to(like).reshape(())


class DeviceHypers:
    """The hyperparameters of parameters of one group whose steps only their device counts.

    Everything is computed anew at each step, from numbers and from the counts, which stay where they are: a CUDA graph
    that holds a step reads nothing that a step beside it may free.

    Args:
        group: the param group; its lr may be a tensor.
        steps: the step counts, on the device.
        counts: float32 [n], the tensor whose views `steps` are, one after the other; None: there is none.
    """

    def __init__(self, group: Mapping[str, Any], steps: list[Tensor], counts: Tensor | None) -> None:
        self.group, self.steps, self.counts = group, steps, counts

    @torch.no_grad()
    def rows(self) -> Tensor:
        """Of the step that follows those counted, float64 [n, len(HyperRow)], with the inverse of root2: some 20 small
        kernels."""
        group, (beta1, beta2) = self.group, map(float, self.group["betas"])
        counts = torch.cat([step.reshape(-1) for step in self.steps]) if self.counts is None else self.counts
        steps = counts.double() + 1
        decay = 1 - group["lr"] * group["weight_decay"]
        columns = HyperRow(decay, 1 - beta1, beta2, 1 - beta2, (1 - beta2**steps).rsqrt_(), group["eps"],
                           group["lr"] / (1 - beta1**steps), -1.0 if group["maximize"] else 1.0, steps)
        table = torch.empty(len(steps), len(columns), dtype=torch.float64, device=steps.device)
        for index, column in enumerate(columns):
            table[:, index] = column
        return table

    def count(self, found_inf: Tensor | None) -> None:
        """One step more, unless `found_inf` is not zero."""
        one = counted(found_inf, self.steps[0])
        if self.counts is None:
            torch._foreach_add_(self.steps, one)
        else:
            self.counts.add_(one)


@dataclass(eq=False)
class ParamUpdate:
    """One parameter of one step; kept for the next one, which may change `grad` and nothing else.

    Attributes:
        name: for errors.
        param, grad: same shape; outside the blocks neither is read or written. Of DTensors, here
            and in the state, the shards of this rank are taken.
        blocks: what trains; None: the whole parameter, and state of the parameter's shape.
        exp_avg, exp_avg_sq, max_exp_avg_sq: the state; the last only with amsgrad.
        low: what 16 bits of the parameter do not hold: int16 for "split", of the parameter's
            dtype for "kahan", None otherwise.
        master: None, "split", "kahan" or "stochastic"; only where the parameter has 16 bits.
        stream: which stream of random bits is this parameter's.
        row, n_rows: its rows of `HyperTable`: one for all blocks, or one for each span of blocks.
        counts_on_device: its rows are in `HyperTable.on_device`.
        scales: of 8-bit exp_avg (int8) and exp_avg_sq (uint8), float32, one for 64 elements of
            a block, block after block; None for other moments.
        step: the parameter's step count, where this step is to advance it.
        owner, sharded: the parameter as the optimizer knows it; whether `param` is a shard of it.
        weight_copy: of a sliced leaf: the full weight, of the same dtype, that holds a synchronised
            copy of its values at `Block.copy_start`; the step writes them there too.
    """

    name: str
    param: Tensor
    grad: Tensor
    blocks: tuple[Block, ...] | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    low: Tensor | None = None
    master: str | None = None
    stream: int = 0
    row: int = 0
    n_rows: int = 1
    counts_on_device: bool = False
    scales: tuple[Tensor, Tensor] | None = None
    weight_copy: Tensor | None = None
    step: Tensor | None = None

    def __post_init__(self) -> None:
        self.owner, self.sharded = self.param, is_sharded(self.param)
        if self.sharded:
            self.param, self.grad = local_part(self.param), local_part(self.grad)
            self.exp_avg, self.exp_avg_sq = local_part(self.exp_avg), local_part(self.exp_avg_sq)
            self.max_exp_avg_sq, self.low = (t if t is None else local_part(t) for t in (self.max_exp_avg_sq, self.low))

    @cached_property
    def launch_key(self) -> tuple:
        """What tensors share that share a launch."""
        return (self.param.device, self.param.dtype, self.grad.dtype, self.exp_avg.dtype, self.master,
                self.max_exp_avg_sq is not None, self.counts_on_device)

    @property
    def launchable(self) -> bool:
        """The kernel can address it: contiguous where all of it trains, else with contiguous rows."""
        tensors = [t for t in (self.param, self.grad, self.weight_copy) if t is not None]
        if torch.float64 in (self.param.dtype, self.grad.dtype):
            return False
        if self.blocks is None:
            return all(t.is_contiguous() for t in tensors)
        return all(t.is_contiguous() or t.ndim == 1 or (t.ndim == 2 and t.stride(1) == 1) for t in tensors)
