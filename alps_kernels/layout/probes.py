"""How the behavioural check sees which heads a perturbation reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import AttentionLayer, HeadSlice
from .projections import unwrap


class InputProbe:
    """Sees the output projection's input: one column per feature."""

    def __init__(self, layer: AttentionLayer, modules: dict[str, nn.Module], call: Callable[[], Any]) -> None:
        self.layer, self.call = layer, call
        self.outer = None if layer.output is None else modules[layer.output]
        self.seen: Tensor | None = None

    def columns(self, head: int) -> list[int]:
        return [
            c for part in self.layer.heads[head] if part.role == "o" for c in range(part.start, part.stop)
        ]

    def sees(self) -> bool:
        """Whether the attention module calls its output projection as a module."""
        return self.outer is not None and self.run() is not None

    def run(self) -> Tensor | None:
        """[positions, n_in] in float32."""
        self.seen = None
        handle = self.outer.register_forward_pre_hook(self._keep, with_kwargs=True)
        try:
            self.call()
        finally:
            handle.remove()
        return self.seen

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        inner, _ = unwrap(self.outer, "")
        value = value.movedim(1, -1) if inner.weight.ndim > 2 else value  # a convolution: [batch, n_in, ...]
        self.seen = value.detach().reshape(-1, value.shape[-1]).float().clone()


class HeadProbe:
    """Where no module takes the heads' outputs (torch's MultiheadAttention, XLNet): one column per head.

    A head's column is what the attention module returns while the output projection is zero
    outside the columns of that head.
    """

    def __init__(
        self, layer: AttentionLayer, params: dict[str, nn.Parameter], call: Callable[[], Any]
    ) -> None:
        self.layer, self.params, self.call = layer, params, call

    def columns(self, head: int) -> list[int]:
        return [head]

    def run(self) -> Tensor:
        """[returned elements, heads] in float32."""
        return torch.stack([self._alone(unit) for unit in self.layer.heads], 1)

    def _alone(self, unit: Sequence[HeadSlice]) -> Tensor:
        own = [part for part in unit if part.role == "o"]
        weight = self.params[own[0].param].data
        kept = weight.clone()
        try:
            weight.zero_()
            for part in own:
                part.of(weight).copy_(part.of(kept))
            return first_tensor(self.call()).float().reshape(-1).clone()
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
    norms = [
        m
        for m in stage.modules()
        if m is not stage and "norm" in type(m).__name__.lower() and not any(True for _ in m.children())
    ]
    kept = [m.__dict__.get("forward") for m in norms]
    for module in norms:
        module.forward = pass_on
    try:
        yield
    finally:
        for module, forward in zip(norms, kept, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def pass_on(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return value
