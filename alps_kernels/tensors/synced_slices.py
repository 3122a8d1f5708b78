"""Parameter slices that are kept in sync with their weight.

A sliced projection holds the selected rows or columns of its weight in a compact leaf
parameter, which is the truth, and multiplies with the full weight, which follows it. A
`SyncedSlice` knows whether the two may differ and makes the full weight current.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .dtensor import is_sharded, read_ranges, write_ranges
from .ranges import Ranges

LEAF_SUFFIX = "_slice"  # the leaf of `weight` is the parameter `weight_slice` of the same module

# Parameters by id; a parameter does not own its synced slice, the sliced module does.
_BY_LEAF: dict[int, tuple[weakref.ref, weakref.ref]] = {}
_BY_WEIGHT: dict[int, tuple[weakref.ref, weakref.ref]] = {}


class SyncedSlice:
    """One sliced parameter of one module: which part its leaf holds, and whether the two agree.

    Args:
        module: the sliced projection.
        name: of the full parameter in it, "weight" or "bias".
        dim: the axis that is cut, of the parameter as stored: 0 rows, 1 columns.
        ranges: half-open along `dim`, sorted, disjoint; the leaf is their concatenation.
        trained_before: `requires_grad` of the full parameter before it was sliced.
    """

    adopted = 0  # how often any of them took other parameters for its own

    def __init__(self, module: nn.Module, name: str, dim: int, ranges: Ranges, trained_before: bool) -> None:
        self.module, self.name, self.dim, self.ranges, self.trained_before = module, name, dim, ranges, trained_before
        self.always = False  # a CUDA graph that is replayed changes both unseen
        self._forget()

    def _forget(self) -> None:
        self._adopted: tuple = (None, None)
        self._stamp: tuple | None = None
        self._cached_views: tuple | None = None
        self.formed = False  # a gradient, since weight and leaf last agreed
        self._grad_mode: bool | None = None  # of the last forward

    def __getstate__(self) -> dict[str, Any]:
        kept = ("module", "name", "dim", "ranges", "trained_before", "always")
        return {key: self.__dict__[key] for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def weight(self) -> Tensor:
        """The full parameter, as the module holds it now."""
        return self.module._parameters[self.name]

    @property
    def leaf(self) -> nn.Parameter:
        """The trained slices, as the module holds them now."""
        return self.module._parameters[self.name + LEAF_SUFFIX]

    @property
    def size(self) -> int:
        """The leaf's length along `dim`."""
        return sum(stop - start for start, stop in self.ranges)

    def blocks(self, weight: Tensor) -> list[Tensor]:
        """The leaf's ranges as views of a tensor of the full parameter's shape."""
        return [weight.narrow(self.dim, start, stop - start) for start, stop in self.ranges]

    def pairs(self, weight: Tensor, leaf: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(part of the weight, part of the leaf), range by range, views."""
        return list(zip(self.blocks(weight), leaf.split([b - a for a, b in self.ranges], self.dim), strict=True))

    def cut(self, weight: Tensor) -> Tensor:
        """The leaf's values, from a tensor of the full parameter's shape; a collective where it is sharded."""
        if is_sharded(weight):
            return read_ranges(weight.detach(), self.dim, self.ranges)
        return torch.cat([block.detach() for block in self.blocks(weight)], self.dim)

    def composed(self, weight: Tensor, leaf: Tensor) -> Tensor:
        """A weight of its own with the leaf in it, differentiable: torch.func's transforms bear no writing."""
        index = torch.cat([torch.arange(start, stop, device=weight.device) for start, stop in self.ranges])
        return weight.index_copy(self.dim, index, leaf)

    # -- do they agree -----------------------------------------------------------------------

    def adopt(self) -> None:
        """From now on the module's parameters are these objects. They count as different until a copy."""
        weight, leaf = self.weight, self.leaf
        SyncedSlice.adopted += 1
        self._adopted = (weakref.ref(weight), weakref.ref(leaf))
        self._stamp = self._cached_views = None
        _register(_BY_WEIGHT, weight, self)
        _register(_BY_LEAF, leaf, self)

    def owns(self, weight: Tensor, leaf: Tensor) -> bool:
        """These are the module's own parameters, not stand-ins that live for one call (FSDP2, functional_call)."""
        return all(ref is not None and ref() is t for ref, t in zip(self._adopted, (weight, leaf), strict=True))

    def writable(self, leaf: Tensor) -> bool:
        """A step may write `weight` where it writes `leaf`: plain tensors of one dtype and device."""
        weight = self.weight
        return (self.owns(weight, leaf) and weight.dtype == leaf.dtype and weight.device == leaf.device
                and not weight.is_meta and all(type(t) in (Tensor, nn.Parameter) for t in (weight, leaf)))

    def written(self, leaf: Tensor) -> None:
        """Whoever calls this has just made the weight's slices and the leaf equal."""
        self.formed = False
        self._stamp = self._now(self.weight, leaf)

    def stale(self, weight: Tensor, leaf: Tensor) -> bool:
        """The two may differ. A change through `leaf.data` leaves no trace but the gradient before it."""
        return self.formed or self._stamp != self._now(weight, leaf)

    @staticmethod
    def _now(weight: Tensor, leaf: Tensor) -> tuple:
        return leaf._version, leaf.data_ptr(), weight._version, weight.data_ptr()

    # -- make them agree ---------------------------------------------------------------------

    def refresh(self, weight: Tensor, leaf: Tensor) -> None:
        """Copy leaf to weight where they may differ; `weight` and `leaf` are what the module uses now.

        Between training and evaluation averages of weights are swapped in through `.data`, unseen:
        where the grad mode has changed they may differ.
        """
        mode, self._grad_mode = self._grad_mode, torch.is_grad_enabled()
        if weight.is_cuda and torch.cuda.is_current_stream_capturing():
            self.always = True
        if not self.owns(weight, leaf):
            self._copy(weight, leaf, silent=True)  # it may have been filled anew since the last call
            self._stamp = None
        elif self.always or mode not in (None, self._grad_mode) or self.stale(weight, leaf):
            self.copy(weight, leaf)

    def sync(self) -> None:
        """Copy leaf to weight, as the module holds them now."""
        weight, leaf = self.weight, self.leaf
        if self.owns(weight, leaf):
            self.copy(weight, leaf)
        else:
            self.refresh(weight, leaf)

    def copy(self, weight: Tensor, leaf: Tensor) -> None:
        """Copy leaf to weight, the module's own parameters, whether or not they differ."""
        # Where nothing but a gradient speaks of a change, a graph that saved the weight stays usable,
        # as it would for a weight changed through `.data`.
        self._copy(weight, leaf, silent=self._stamp == self._now(weight, leaf))
        self.formed = False
        self._stamp = self._now(weight, leaf)

    def _copy(self, weight: Tensor, leaf: Tensor, *, silent: bool) -> None:
        if is_sharded(weight):  # between steps of FSDP2, for whoever reads the shards
            with torch.no_grad():
                return write_ranges(weight, leaf, self.dim, self.ranges)
        keep = torch.autograd._unsafe_preserve_version_counter(weight) if silent else nullcontext()
        with torch.no_grad(), keep:
            torch._foreach_copy_(*self._views(weight, leaf))

    def _views(self, weight: Tensor, leaf: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """`pairs`, apart; kept for the module's own parameters, since they cost more than the copy."""
        key = (weight.data_ptr(), leaf.data_ptr(), weight.dtype, leaf.dtype)
        if self._cached_views is not None and self._cached_views[0] == key:
            return self._cached_views[1]
        views = tuple(map(list, zip(*self.pairs(weight.detach(), leaf.detach()), strict=True)))
        if self.owns(weight, leaf) and not torch.is_inference_mode_enabled():
            self._cached_views = (key, views)
        return views

    def stepped(self, leaf: Tensor) -> None:
        """An optimizer made a step on the leaf alone: copy.

        The next forward copies once more: whoever steps may also clip or shrink through `.data`.
        """
        weight, formed = self.weight, self.formed
        if self.owns(weight, leaf) and (self.stale(weight, leaf) or leaf.grad is not None):
            self.copy(weight, leaf)
            self.formed = formed


def written_together(slices: Sequence[SyncedSlice], leaves: Sequence[Tensor], weights: Sequence[Tensor],
                     addresses: Sequence[tuple[int, int]]) -> None:
    """`SyncedSlice.written` of many, whose leaves and weights are known to be these and to lie there."""
    for synced, leaf, weight, (of_leaf, of_weight) in zip(slices, leaves, weights, addresses, strict=True):
        synced.formed = False
        synced._stamp = leaf._version, of_leaf, weight._version, of_weight


def synced_slice_of(param: Tensor) -> SyncedSlice | None:
    """What a sliced leaf is kept in sync with; None for every other parameter."""
    return _found(_BY_LEAF, param)


def leaf_of(weight: Tensor) -> nn.Parameter | None:
    """The leaf that holds trained slices of a full parameter; None for every other parameter."""
    synced = _found(_BY_WEIGHT, weight)
    return None if synced is None else synced.leaf


def synced_slices_in(model: nn.Module) -> Iterator[tuple[str, SyncedSlice]]:
    """(name of the full parameter, synced slice) of every sliced parameter, each once, FSDP2 or not."""
    for prefix, module in model.named_modules():
        for name, synced in getattr(module, "_synced", {}).items():
            yield f"{prefix}.{name}" if prefix else name, synced


def sync_weights(model: nn.Module) -> None:
    """Write every leaf into its full weight, seen to be changed or not: for whoever reads weights without a forward."""
    for _, synced in synced_slices_in(model):
        synced.sync()


def _register(table: dict, param: Tensor, synced: SyncedSlice) -> None:
    key = id(param)

    def gone(dead: weakref.ref) -> None:
        if table.get(key, (None,))[0] is dead:
            del table[key]

    table[key] = weakref.ref(param, gone), weakref.ref(synced)


def _found(table: dict, param: Tensor) -> SyncedSlice | None:
    entry = table.get(id(param))
    return entry[1]() if entry is not None and entry[0]() is param else None


def sync_after_step(optimizer: torch.optim.Optimizer, args: tuple = (), kwargs: dict | None = None) -> None:
    """Weights follow their leaves right after a step of any optimizer, so that every reader sees them."""
    if not _BY_LEAF or torch.compiler.is_compiling():
        return
    sync_leaves([p for group in optimizer.param_groups for p in group["params"]])


def sync_leaves(params: Sequence[Tensor]) -> None:
    """Full weights follow those of these parameters that are leaves, after a step of an optimizer."""
    for param in params:
        if (synced := _found(_BY_LEAF, param)) is not None:
            synced.stepped(param)


STEP_HOOK = register_optimizer_step_post_hook(sync_after_step)
