"""A projection whose backward forms only the trained slices of dW, and whose forward is the plain one."""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import CheckpointFunction

from ..tensors import LEAF_SUFFIX, Ranges, SyncedSlice, is_sharded, local_part, placed_like, share_of
from .compiled_ops import input_grad, write_slices
from .weight_grad import head_grad, select_columns

# Where a forward is defined that a sliced projection repeats, and how it multiplies.
PRODUCTS = {("torch.nn.modules.linear", "Linear"): "linear", ("transformers.pytorch_utils", "Conv1D"): "addmm",
            ("transformers.models.falcon.modeling_falcon", "FalconLinear"): "matmul"}


class TrainedRanges(NamedTuple):
    """What of a projection trains.

    Attributes:
        product: which forward it has, one of the values of `PRODUCTS`.
        outputs: the weight's ranges count output features (q, k, v), not input features (o).
        weight, bias: half-open ranges; None where nothing of it trains.
    """

    product: str
    outputs: bool
    weight: Ranges | None
    bias: Ranges | None

    @property
    def transposed(self) -> bool:
        """The weight is [n_in, n_out], not [n_out, n_in]."""
        return self.product == "addmm"

    @property
    def dim(self) -> int:
        """The axis of the weight as stored that is cut."""
        return int(self.outputs == self.transposed)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, product: str) -> Tensor:
    """What the projection computes, by the calls that its own class makes."""
    if product == "linear":
        return F.linear(x, weight, bias)
    if product == "matmul":
        out = x @ weight.T
        return out if bias is None else out + bias
    return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])


class SlicedProject(torch.autograd.Function):
    """y = x W^T + b with the full weight; gradients of x and of the leaves alone.

    Saves x where rows of W train, its selected columns where columns do, nothing else of it;
    the weight where x needs a gradient. Under autocast the inputs are kept as they came and cast
    again in backward: q, k and v then share one x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, weight_leaf: Tensor | None,
                bias_leaf: Tensor | None, trained: TrainedRanges, synced: tuple[SyncedSlice, ...]) -> Tensor:
        out = plain(x, weight, bias, trained.product)
        kept = leaf = None
        if ctx.needs_input_grad[3]:
            kept = x
            if not trained.outputs:
                kept = select_columns(x, trained.weight).to(out.dtype, copy=len(trained.weight) == 1)
        owned = synced and weight_leaf is not None and synced[0].owns(weight, weight_leaf)
        if ctx.needs_input_grad[0] and not owned:
            leaf = weight_leaf  # FSDP2 fills the weight anew before backward
        ctx.save_for_backward(kept, weight if ctx.needs_input_grad[0] else None, leaf)
        ctx.trained, ctx.synced, ctx.shape, ctx.dtype = trained, synced, x.shape, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        device = dy.device.type  # meta has no autocast; is_autocast_available is not traced in torch 2.11
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return SlicedProject._grads(ctx, dy)
        return SlicedProject._grads(ctx, dy)

    @staticmethod
    def _grads(ctx: Any, dy: Tensor) -> tuple:
        kept, weight, leaf = ctx.saved_tensors
        trained: TrainedRanges = ctx.trained
        flat = dy.reshape(-1, dy.shape[-1])
        dx = d_weight = d_bias = None
        if weight is not None:
            dx = SlicedProject._input_grad(ctx, flat, weight, leaf).view(ctx.shape).to(ctx.dtype)
        if kept is not None:
            x = kept.reshape(-1, kept.shape[-1]).to(dy.dtype)
            if trained.outputs:
                d_weight = head_grad(flat, x, trained.weight, transposed=trained.transposed)
            else:
                d_weight = head_grad(x, flat, ((0, x.shape[1]),), transposed=not trained.transposed)
        if ctx.needs_input_grad[4]:
            d_bias = select_columns(flat, trained.bias).sum(0)
        for synced in ctx.synced:
            synced.formed = True
        return dx, None, None, d_weight, d_bias, None, None

    @staticmethod
    def _input_grad(ctx: Any, dy: Tensor, weight: Tensor, leaf: Tensor | None) -> Tensor:
        trained: TrainedRanges = ctx.trained
        if leaf is not None and not ctx.synced:
            return input_grad(dy, weight, leaf, *_edges(trained.weight), trained.dim, trained.transposed)
        if leaf is not None:
            ctx.synced[0].refresh(weight, leaf)
        weight = weight.to(dy.dtype)
        return dy.mm(weight.t() if trained.transposed else weight)


def _edges(ranges: Ranges) -> tuple[list[int], list[int]]:
    return [start for start, _ in ranges], [stop for _, stop in ranges]


class Sliced(nn.Module):
    """Mixed into the class of a projection by `sliced_class`: its full weight follows its leaves.

    `state_dict` has the plain projection's keys and the current weights; loading a plain state
    dict refreshes the leaves.
    """

    _synced: dict[str, SyncedSlice]
    _trained: TrainedRanges

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        full = {"weight": weight, "bias": bias}
        leaves = {name: getattr(self, name + LEAF_SUFFIX) for name in self._synced}
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            whole = full | {name: self._synced[name].composed(full[name], leaf) for name, leaf in leaves.items()}
            return plain(x, whole["weight"], whole["bias"], self._trained.product)
        self._refresh(full, leaves)
        trains = [leaf.requires_grad for leaf in leaves.values()]
        if torch.is_grad_enabled():
            if any(full[name].requires_grad for name in leaves):
                raise RuntimeError(_UNFROZEN.format(type(self).__name__, list(weight.shape)))
            if any(trains) or x.requires_grad:
                synced = () if torch.compiler.is_compiling() else tuple(self._synced.values())
                return SlicedProject.apply(x, weight, bias, leaves.get("weight"), leaves.get("bias"), self._trained,
                                           synced)
        elif self.training and any(trains) and not torch.compiler.is_compiling():
            _refuse_lost_gradients()
        return plain(x, weight, bias, self._trained.product)

    def _refresh(self, full: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        """The full parameters become current: where they may differ; in compiled code always.

        There the op marks the weight as changed at every call, so that eager code looks again, too.
        """
        for name, synced in self._synced.items():
            if torch.compiler.is_compiling():
                write_slices(full[name], leaves[name], *_edges(synced.ranges), synced.dim)
            else:
                synced.refresh(full[name], leaves[name])

    def extra_repr(self) -> str:
        shares = [f"{name}: {synced.size} of {synced.weight.shape[synced.dim]} {('rows', 'columns')[synced.dim]} train"
                  for name, synced in self._synced.items()]
        return ", ".join([super().extra_repr(), *shares])

    # -- what moves or replaces tensors ------------------------------------------------------

    def _adopt(self) -> None:
        for synced in self._synced.values():
            synced.adopt()

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._adopt()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for synced in self._synced.values():
            synced.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._synced:
            del destination[prefix + name + LEAF_SUFFIX]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Nothing is written to the full weights before: the state dict may hold these very tensors, as
        # torch.distributed.checkpoint fills them in place.
        given = {name for name, synced in self._synced.items()
                 if getattr(state_dict.get(prefix + name), "shape", None) == synced.weight.shape}
        leaves = {name: self._parameters.pop(name + LEAF_SUFFIX) for name in self._synced}
        for name, leaf in leaves.items():
            if state_dict.get(prefix + name + LEAF_SUFFIX) is leaf:  # set_model_state_dict adds the model's own
                del state_dict[prefix + name + LEAF_SUFFIX]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            for name, synced in self._synced.items():
                leaf = leaves[name]
                leaf = _loaded(leaf, synced.cut(synced.weight)) if name in given else leaf
                self._parameters[name + LEAF_SUFFIX] = leaf
            self._adopt()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _blank, (type(self).plain_class,), self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()


_UNFROZEN = ("{0}: the full parameter {1} of a sliced projection requires grad, but only its trained slices have "
             "gradients; leave requires_grad of full parameters alone, or call alps_kernels.unslice_heads first")


@functools.cache
def sliced_class(plain_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a projection's class that trains slices; one for each class."""
    return type(f"Sliced{plain_class.__name__}", (Sliced, plain_class),
                {"plain_class": plain_class, "__module__": __name__, "__doc__": Sliced.__doc__})


def _blank(plain_class: type[nn.Module]) -> nn.Module:
    cls = sliced_class(plain_class)
    return cls.__new__(cls)


@torch.no_grad()
def _loaded(leaf: nn.Parameter, values: Tensor) -> nn.Parameter:
    """The leaf with new values: the same parameter where it can hold them, for its optimizer's sake."""
    held = share_of(leaf, values)
    if leaf.is_meta and not values.is_meta:
        return nn.Parameter(placed_like(leaf, held.clone()), requires_grad=leaf.requires_grad)
    if not is_sharded(leaf) and (leaf.dtype, leaf.device) != (values.dtype, values.device):
        leaf.data = values
    else:
        local_part(leaf).copy_(held)
    return leaf


def _refuse_lost_gradients() -> None:
    """Raises RuntimeError inside reentrant checkpointing of which no input needs a gradient: it gives none at all."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    if frame is not None and not any(isinstance(arg, Tensor) and arg.requires_grad for arg in frame.f_locals["args"]):
        raise RuntimeError("reentrant gradient checkpointing gives the heads in here no gradient, because none of its "
                           "inputs requires one; use use_reentrant=False, or model.enable_input_require_grads()")
