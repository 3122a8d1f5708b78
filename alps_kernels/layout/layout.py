"""`HeadLayout`: all attention layers of a model; look heads up, print them, verify them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tensors import matrix_shape
from .slices import PART_OF, ROLES, AttentionLayer, HeadSlice, LayerSummary, LayoutError
from .verify import verify_layers


@dataclass(frozen=True)
class HeadLayout:
    """Every attention head of a model and what it owns.

    Attributes:
        layers: the attention layers in the order of `model.named_modules()`.
        shapes: the shape of every parameter that a slice names.
        model_type: `config.model_type`, or the class name of a model without one.
    """

    layers: tuple[AttentionLayer, ...]
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    model_type: str = ""

    def __post_init__(self) -> None:
        for layer, part in ((layer, part) for layer in self.layers for part in layer.parts):
            shape = self.shapes.get(part.param)
            if shape is None:
                raise LayoutError(f"{layer.module}: a slice names {part.param}, which has no shape here")
            extent = matrix_shape(shape)[part.dim] if part.dim in (0, 1) else 0
            if part.role not in ROLES or not 0 <= part.start < part.stop <= extent:
                raise LayoutError(f"{layer.module}: {part.role} slice [{part.start}, {part.stop}) does not lie in "
                                  f"dimension {part.dim} of {part.param} {list(shape)}")

    @property
    def n_heads(self) -> int:
        return sum(layer.n_heads for layer in self.layers)

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        return tuple(layer.n_heads for layer in self.layers)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """All (layer, head) pairs in order."""
        return ((layer.index, head) for layer in self.layers for head in range(layer.n_heads))

    def __len__(self) -> int:
        return self.n_heads

    def slices(self, layer: int, head: int) -> tuple[HeadSlice, ...]:
        """The slices of one head: its own (q, gate, o), then its group's (k, v).

        Raises:
            IndexError: no such layer or head; the message says how many there are.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer {layer} is not in this layout of {len(self.layers)} layers")
        if not 0 <= head < self.layers[layer].n_heads:
            raise IndexError(f"head {head} is not in layer {layer} ({self.layers[layer].module}), "
                             f"which has {self.layers[layer].n_heads} heads")
        return self.layers[layer].slices(head)

    def summary(self) -> tuple[LayerSummary, ...]:
        """The sizes of every layer: what a file of scores or heads keeps of the layout."""
        return tuple(
            LayerSummary(a.module, a.group_of, self._sizes(a, a.heads), self._sizes(a, a.groups)) for a in self.layers
        )

    def _sizes(self, layer: AttentionLayer, units: tuple[tuple[HeadSlice, ...], ...]) -> dict[str, int]:
        """Elements per part of one head or group; all of a layer are alike."""
        sizes = []
        for unit in units:
            size: dict[str, int] = {}
            for part in {(p.param, p.dim, p.start): p for p in unit}.values():  # rows that are k and v count once
                across = matrix_shape(self.shapes[part.param])[1 - part.dim]
                size[PART_OF[part.role]] = size.get(PART_OF[part.role], 0) + across * part.size
            sizes.append(size)
        if any(size != sizes[0] for size in sizes):
            raise LayoutError(f"{layer.module}: its heads differ in size: {sizes}")
        return sizes[0] if sizes else {}

    def where(self, attention: str | Sequence[int] = "all") -> tuple[int, ...]:
        """Indices of the layers of one sort of attention.

        Args:
            attention: "all", a kind ("self", "cross"), a tower ("encoder", "text", ...), a
                kind and tower joined by a dash ("decoder-cross"), or layer indices.

        Raises:
            ValueError: nothing of that sort is here; the message lists what is.
        """
        if not isinstance(attention, str):
            indices = isinstance(attention, (list, tuple, set, frozenset, range))
            if not indices or not all(type(i) is int for i in attention):
                raise TypeError(f"attention is {attention!r}; expected the name of a sort of attention, or layer "
                                "indices")
            chosen = tuple(sorted(set(attention)))
            if missing := [i for i in chosen if not 0 <= i < len(self.layers)]:
                raise ValueError(f"layers {missing} are not in this layout of {len(self.layers)}")
            return chosen
        names = {i: {"all", a.kind, a.tower, f"{a.tower}-{a.kind}"} for i, a in enumerate(self.layers)}
        chosen = tuple(i for i, known in names.items() if attention in known)
        if not chosen or not attention:
            known = sorted(set().union(*names.values()) - {""})
            raise ValueError(f"no attention called {attention!r} in this model; there is {known}")
        return chosen

    def __str__(self) -> str:
        lines = [f"{self.model_type or 'model'}: {self.n_heads} heads in {len(self.layers)} attention layers"]
        for layer in self.layers:
            first = " ".join(
                f"{p.role}{'.bias' if p.bias else ''}={p.param.removeprefix(layer.module + '.')}"
                f"[{':, ' if p.dim else ''}{p.start}:{p.stop}]"
                for p in (layer.slices(0) if layer.heads else ())
            )
            sort = " ".join(filter(None, (layer.tower, layer.kind)))
            lines.append(f"{layer.index:4d}  {layer.module}  {sort}  {layer.n_heads} heads"
                         f" / {layer.n_groups} kv groups  head 0: {first}")
        return "\n".join(lines)

    def verify(self, model: torch.nn.Module, inputs: Mapping[str, Any] | None = None, *,
               layers: Sequence[int] | None = None, seed: int = 0) -> None:
        """Perturb every claimed block and see that the claimed columns move, and no others.

        The model is run once in eval mode, then each attention module alone; weights, hooks, modes
        and the random state are what they were afterwards, also after an error.

        Args:
            model: the model that this layout was found in.
            inputs: keyword arguments of the model. Default: random `input_ids` (and
                `decoder_input_ids`), which reach the text layers only.
            layers: indices of the layers to check. Default: all; those that the inputs do not reach
                are an error, never passed over.
            seed: of the default inputs and of the perturbations.

        Raises:
            LayoutError: a block moves other columns than claimed, or a layer cannot be checked
                (not reached, or its output projection's input cannot be seen); names layer and head.
        """
        chosen = self.layers if layers is None else tuple(self.layers[i] for i in self.where(tuple(layers)))
        verify_layers(chosen, self.shapes, model, inputs, seed)
