"""Counting what one training step costs: bytes kept for the backward pass, gradients, state, products, operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
# Matrix products, and which argument is the first factor.
PRODUCTS = {ATEN.mm.default: 0, ATEN.bmm.default: 0, ATEN.addmm.default: 1, ATEN.baddbmm.default: 1}


@dataclass
class Work:
    """What a stretch of code did.

    Attributes:
        flops: of matrix products, a multiplication and an addition counted as two.
        weight_flops: those of products that sum over the tokens: they form weight gradients.
        ops: operations by name; views and other operations that move no data are left out.
        written: bytes of their results.
    """

    flops: int = 0
    weight_flops: int = 0
    ops: Counter = field(default_factory=Counter)
    written: int = 0


class Watch(TorchDispatchMode):
    """Adds the operations that run under it to `work`.

    Args:
        tokens: rows of every activation (batch times sequence). A product that sums over as
            many elements forms a weight gradient, so no other size may be equal to it.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.work = tokens, Work()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.is_view or op in (ATEN.detach.default, ATEN._unsafe_view.default, ATEN.alias.default):
            return out
        self.work.ops[str(op)] += 1
        results = args[0] if out is None and args else out  # in-place operations on lists return nothing
        self.work.written += sum(t.numel() * t.element_size() for t in tensors_of(results))
        count = flop_registry.get(op.overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        self.work.flops += flops
        if op in PRODUCTS and args[PRODUCTS[op]].shape[-1] == self.tokens:
            self.work.weight_flops += flops
        return out


class Saved:
    """Bytes of the distinct storages that autograd keeps, parameters and buffers not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.known = {storage_of(t): t.untyped_storage() for t in known}  # held, so that no identity is used twice
        self.found: dict[int, object] = {}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        for plain in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            self.found[storage_of(plain)] = plain.untyped_storage()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for key, storage in self.found.items() if key not in self.known)


@dataclass
class Step:
    """One training step, counted. Bytes are bytes; `trained` counts elements."""

    trained: int
    saved: int
    grads: int
    state: int
    forward: Work
    backward: Work


def count_step(model: torch.nn.Module, forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer, tokens: int,
               trained: int | None = None) -> Step:
    """Run one step under the counters.

    Args:
        forward: gives the loss; its result may need no gradient, then there is no backward pass.
        trained: elements that train; default: those of the parameters that have a gradient.
    """
    known = [*model.parameters(), *model.buffers()]
    saved = Saved(known)
    with Watch(tokens) as forwards, saved.hooks():
        loss = forward()
    with Watch(tokens) as backwards:
        if loss.requires_grad:
            loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    counted = sum(g.numel() for g in grads) if trained is None else trained
    return Step(counted, saved.bytes, sum(g.numel() * g.element_size() for g in grads), state_bytes(optimizer),
                forwards.work, backwards.work)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps, wrapped ones (torchao's) by what they hold."""
    return sum(inner.numel() * inner.element_size() for state in optimizer.state.values()
               for value in state.values() for inner in tensors_of(value))


def tensors_of(value: object) -> list[Tensor]:
    """The plain tensors in a result or a state entry."""
    if isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            return [inner for name in value.__tensor_flatten__()[0] for inner in tensors_of(getattr(value, name))]
        return [value]
    if isinstance(value, (list, tuple)):
        return [inner for item in value for inner in tensors_of(item)]
    if isinstance(value, dict):
        return [inner for item in value.values() for inner in tensors_of(item)]
    return []


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
