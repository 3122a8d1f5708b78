"""Record what each head writes while a module runs; `verify` compares it before and after a perturbation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .projections import unwrap
from .slices import AttentionLayer, HeadSlice


def catch(call: Callable[[], Any], modules: Mapping[str, nn.Module], *, last: bool = False) -> dict[str, tuple]:
    """Copies of the arguments, (args, kwargs), of the first or last call of each module while `call` runs."""
    calls: dict[str, tuple] = {}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if last or name not in calls:
            calls[name] = copy.deepcopy((args, kwargs))

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(keep, name), with_kwargs=True).remove)
        call()
    return calls


class InputProbe:
    """Sees the output projection's input: one column per feature."""

    def __init__(self, layer: AttentionLayer, modules: dict[str, nn.Module], call: Callable[[], Any]) -> None:
        self.layer, self.call = layer, call
        self.outer = None if layer.output is None else modules[layer.output]

    def columns(self, head: int) -> list[int]:
        return [c for part in self.layer.heads[head] if part.role == "o" for c in range(part.start, part.stop)]

    def sees(self) -> bool:
        """Whether the attention module calls its output projection as a module."""
        return self.outer is not None and self.run() is not None

    def run(self) -> Tensor | None:
        """[positions, n_in] in float32."""
        calls = catch(self.call, {"output": self.outer}, last=True)
        if not calls:
            return None
        args, kwargs = calls["output"]
        value = args[0] if args else next(iter(kwargs.values()))
        convolution = unwrap(self.outer, "")[0].weight.ndim > 2
        order = "batch n_in ... -> (batch ...) n_in" if convolution else "... n_in -> (...) n_in"
        return rearrange(value, order).float()


class HeadProbe:
    """Where no module takes the heads' outputs (torch's MultiheadAttention, XLNet): one column per head.

    A head's column is what the attention module returns while the output projection is zero
    outside the columns of that head.
    """

    def __init__(self, layer: AttentionLayer, params: dict[str, nn.Parameter], call: Callable[[], Any]) -> None:
        self.layer, self.params, self.call = layer, params, call

    def columns(self, head: int) -> list[int]:
        return [head]

    def run(self) -> Tensor:
        """[returned elements, heads] in float32."""
        return rearrange([self._alone(unit) for unit in self.layer.heads], "head ... -> (...) head")

    def _alone(self, unit: Sequence[HeadSlice]) -> Tensor:
        own = [part for part in unit if part.role == "o"]
        weight = self.params[own[0].param].data
        kept = weight.clone()
        try:
            weight.zero_()
            for part in own:
                part.of(weight).copy_(part.of(kept))
            return first_tensor(self.call()).float().clone()
        finally:
            weight.copy_(kept)


def first_tensor(value: Any) -> Tensor:
    """The first tensor in what a module returned."""
    while not isinstance(value, Tensor):
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value


@contextmanager
def norms_pass(stage: nn.Module) -> Iterator[None]:
    """Norms inside `stage` return their input unchanged."""
    inside = [m for m in stage.modules() if m is not stage and not any(True for _ in m.children())]
    norms = [m for m in inside if "norm" in type(m).__name__.lower()]
    kept = [m.__dict__.get("forward") for m in norms]
    for module in norms:
        module.forward = lambda value, *args, **kwargs: value
    try:
        yield
    finally:
        for module, forward in zip(norms, kept, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
