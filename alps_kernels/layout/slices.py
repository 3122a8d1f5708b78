"""Data classes of the room: `HeadSlice`, `AttentionLayer`, `LayerSummary`, and `LayoutError`."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def parts(self) -> tuple[HeadSlice, ...]:
        """Every slice of its heads, then of its groups."""
        return sum((*self.heads, *self.groups), ())

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
