"""Where each attention head lives in a model's weights: the vocabulary.

A `HeadLayout` lists the attention layers of a model; each layer says which slices of which
parameters every query head owns, and which every key/value group owns. `locate.find_heads`
makes one from a model. This file knows torch and nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..tensors import as_matrix

ROLES = ("q", "q_rope", "gate", "k", "v", "o")
# The projection that a role trains with: rotary rows and output gates go with the query.
PART_OF = {"q": "q", "q_rope": "q", "gate": "q", "k": "k", "v": "v", "o": "o"}


class LayoutError(ValueError):
    """A model's attention heads cannot be located, or do not match what was expected."""


@dataclass(frozen=True)
class HeadSlice:
    """One contiguous block of rows or columns of one parameter.

    Attributes:
        param: the parameter's name in `model.named_parameters()`.
        role: what the block does, one of `ROLES`. `q_rope`: the rotary rows of a query that
            has its own (MLA); `gate`: an output gate stored beside the query.
        dim: the axis that is cut, 0 rows or 1 columns of the parameter seen as [shape[0], -1].
        start, stop: the half-open range along `dim`.
        bias: the parameter is a bias vector, [n] seen as [n, 1].
    """

    param: str
    role: str
    dim: int
    start: int
    stop: int
    bias: bool = False

    @property
    def size(self) -> int:
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """The block as a view of `tensor` (the parameter or something of its shape), 2-D."""
        return as_matrix(tensor).narrow(self.dim, self.start, self.size)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The block in the orientation of `nn.Linear`, a view.

        [head_dim, d] for q, k, v and gate, [d, head_dim] for o, however the model stores it.
        """
        block = self.of(tensor)
        natural = 1 if self.role == "o" and not self.bias else 0
        return block if self.dim == natural else block.t()


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of a model.

    Attributes:
        index: its position in `HeadLayout.layers`; the `layer` of a (layer, head) pair.
        module: its name in `model.named_modules()`.
        kind: "self" or "cross".
        tower: what it belongs to in a model of several stacks ("encoder", "decoder", "text",
            "vision", "audio" ...), "" in a model of one.
        heads: for every query head the slices it alone owns (q, gate, o and their biases).
        groups: for every key/value group the slices it owns (k, v and their biases). Empty
            where the layer reuses the keys and values of another.
        group_of: for every query head the index of its group.
        output: the name of the output projection's module, or None.
        kv_layer: where k and v are another layer's, that layer's index.
    """

    index: int
    module: str
    kind: str
    tower: str
    heads: tuple[tuple[HeadSlice, ...], ...]
    groups: tuple[tuple[HeadSlice, ...], ...]
    group_of: tuple[int, ...]
    output: str | None = None
    kv_layer: int | None = None

    @property
    def n_heads(self) -> int:
        return len(self.heads)

    @property
    def n_groups(self) -> int:
        return len(self.groups)

    def slices(self, head: int) -> tuple[HeadSlice, ...]:
        """Every slice that query head `head` works with: its own, then its group's."""
        return self.heads[head] + (self.groups[self.group_of[head]] if self.groups else ())


@dataclass(frozen=True)
class LayerSummary:
    """The sizes of one attention layer, small enough to travel in a file.

    Attributes:
        module: the attention module's name.
        group_of: for every query head its key/value group.
        head_size: elements that one query head owns alone, by part ("q", "o").
        group_size: elements that one key/value group owns, by part ("k", "v").
    """

    module: str
    group_of: tuple[int, ...]
    head_size: dict[str, int]
    group_size: dict[str, int]

    def to_json(self) -> dict:
        return {"module": self.module, "group_of": list(self.group_of),
                "head_size": self.head_size, "group_size": self.group_size}

    @classmethod
    def from_json(cls, document: dict) -> LayerSummary:
        """Raises TypeError or ValueError where the document is no summary."""
        if not isinstance(document, dict) or not isinstance(document.get("module"), str):
            raise ValueError("a layer summary is not an object with a module name")
        groups = document.get("group_of")
        if not isinstance(groups, list) or not all(type(g) is int and 0 <= g < max(len(groups), 1) for g in groups):
            raise ValueError(f"group_of of {document['module']} is not a list of group indices")
        sizes = [document.get("head_size"), document.get("group_size")]
        if not all(isinstance(size, dict) and set(size) <= set(PART_OF.values())
                   and all(type(n) is int and n >= 0 for n in size.values()) for size in sizes):
            raise ValueError(f"the sizes of {document['module']} are not counts of elements by part")
        return cls(document["module"], tuple(groups), *sizes)


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
        for layer in self.layers:
            for part in (piece for unit in (*layer.heads, *layer.groups) for piece in unit):
                self._check(layer, part)

    def _check(self, layer: AttentionLayer, part: HeadSlice) -> None:
        shape = self.shapes.get(part.param)
        if shape is None:
            raise LayoutError(f"{layer.module}: a slice names {part.param}, which has no shape here")
        extent = shape[0] if part.dim == 0 else torch.Size(shape[1:]).numel()
        if part.role not in ROLES or not 0 <= part.start < part.stop <= extent:
            raise LayoutError(
                f"{layer.module}: {part.role} slice [{part.start}, {part.stop}) does not lie in "
                f"dimension {part.dim} of {part.param} {list(shape)}"
            )

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
            LayerSummary(layer.module, layer.group_of, self._sizes(layer, layer.heads), self._sizes(layer, layer.groups))
            for layer in self.layers
        )

    def _sizes(self, layer: AttentionLayer, units: tuple[tuple[HeadSlice, ...], ...]) -> dict[str, int]:
        """Elements per part of one head or group; all of a layer are alike."""
        sizes = []
        for unit in units:
            size: dict[str, int] = {}
            for part in {(p.param, p.dim, p.start): p for p in unit}.values():  # rows that are both k and v count once
                numel = torch.Size(self.shapes[part.param]).numel()
                extent = self.shapes[part.param][0] if part.dim == 0 else numel // self.shapes[part.param][0]
                size[PART_OF[part.role]] = size.get(PART_OF[part.role], 0) + numel // extent * part.size
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
            if not isinstance(attention, (list, tuple, set, frozenset, range)) or not all(type(i) is int for i in attention):
                raise TypeError(f"attention is {attention!r}; expected the name of a sort of attention, or layer indices")
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

    def verify(self, model: torch.nn.Module, **options) -> None:
        """Check this layout against the model's behaviour; see `verify.verify_layout`."""
        from .verify import verify_layout

        verify_layout(self, model, **options)
