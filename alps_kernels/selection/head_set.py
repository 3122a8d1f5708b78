"""`HeadSet`, the base class of `HeadSelection`: a set of heads, its checks, set operations and JSON."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partialmethod
from typing import Any, TypeVar

from ..layout import LayerSummary
from ..tensors import check_choice, check_type

FORMAT, VERSION = "alps_kernels.heads", 1
KV_POLICIES = ("any", "none", "all")
PARTS = ("q", "k", "v", "o")
S = TypeVar("S", bound="HeadSet")


class HeadSet:
    """What of a `HeadSelection` needs no model; its arguments are described there."""

    def __init__(
        self,
        heads: Iterable[tuple[int, int]],
        heads_per_layer: Sequence[int],
        *,
        kv: str = "any",
        parts: Sequence[str] = ("q", "k", "v"),
        summary: Sequence[LayerSummary] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        sizes = _several(heads_per_layer, "heads_per_layer", "the number of heads of every layer")
        self.heads_per_layer = tuple(_whole(n, "heads_per_layer has") for n in sizes)
        self.heads = _checked_heads(heads, self.heads_per_layer)
        check_choice("kv", kv, KV_POLICIES)
        collection = isinstance(parts, (list, tuple, set, frozenset))
        if not collection or not parts or not all(part in PARTS for part in parts):
            raise ValueError(f"parts is {parts!r}; expected a sequence of some of {PARTS}")
        self.kv = kv
        self.parts = tuple(part for part in PARTS if part in parts)
        if summary is not None:
            summary = tuple(_several(summary, "summary", "what HeadLayout.summary() returns"))
            if not all(isinstance(layer, LayerSummary) for layer in summary):
                raise TypeError("summary is no list of LayerSummary; expected what HeadLayout.summary() returns")
            if tuple(len(layer.group_of) for layer in summary) != self.heads_per_layer:
                raise ValueError("summary and heads_per_layer disagree on the number of heads")
        self.summary = summary
        check_type("provenance", provenance, (dict, type(None)), "a dict")
        self.provenance = provenance

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def in_layer(self, layer: int) -> list[int]:
        """The selected heads of one attention layer, in order."""
        return [head for owner, head in self.heads if owner == layer]

    def __contains__(self, head: object) -> bool:
        return head in set(self.heads)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSet):
            return NotImplemented
        return (self.heads, self.heads_per_layer, self.kv, self.parts) == (
            other.heads, other.heads_per_layer, other.kv, other.parts)

    def __hash__(self) -> int:
        return hash((self.heads, self.heads_per_layer, self.kv, self.parts))

    def __invert__(self: S) -> S:
        return self._result(all_pairs(self.heads_per_layer), self.heads_per_layer, kv=self.kv, parts=self.parts) - self

    def _combine(self: S, operation: Callable[[set, set], set], other: HeadSet) -> S:
        if not isinstance(other, HeadSet):
            raise TypeError(f"expected a HeadSelection, not {type(other).__name__}")
        for name in ("heads_per_layer", "kv", "parts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"the two selections differ in {name}: {mine} and {theirs}")
        return self._result(operation(set(self.heads), set(other.heads)), self.heads_per_layer, kv=self.kv,
                          parts=self.parts, summary=self.summary or other.summary)

    __or__ = partialmethod(_combine, operator.or_)
    __and__ = partialmethod(_combine, operator.and_)
    __sub__ = partialmethod(_combine, operator.sub)
    __xor__ = partialmethod(_combine, operator.xor)

    def __repr__(self) -> str:
        size = f"{len(self)} of {sum(self.heads_per_layer)} heads"
        return f"{type(self).__name__}({size}, kv={self.kv!r}, parts={self.parts})"

    # -- JSON --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The selection as a JSON document (schema version 1)."""
        return {
            "format": FORMAT, "version": VERSION,
            "heads_per_layer": list(self.heads_per_layer),
            "heads": [list(head) for head in self.heads],
            "kv": self.kv, "parts": list(self.parts),
            "summary": None if self.summary is None else [s.to_json() for s in self.summary],
            "provenance": self.provenance,
        }

    @classmethod
    def from_json(cls: type[S], document: dict[str, Any]) -> S:
        """What `to_json` gave.

        Raises:
            ValueError: the document holds no selection, or heads that cannot be.
        """
        try:
            summary = document.get("summary")
            if not isinstance(document.get("provenance"), (dict, type(None))):
                raise TypeError("provenance is not an object")
            return cls(
                [tuple(head) for head in document["heads"]], document["heads_per_layer"],
                kv=document["kv"], parts=document["parts"], provenance=document.get("provenance"),
                summary=None if summary is None else [LayerSummary.from_json(s) for s in summary],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"not a valid head selection: {what}") from error


HeadSet._result = HeadSet  # the class of what set operations give; that of a subclass is its base's


def all_pairs(heads_per_layer: Sequence[int]) -> list[tuple[int, int]]:
    return [(layer, head) for layer, n in enumerate(heads_per_layer) for head in range(n)]


def _whole(value: Any, what: str) -> int:
    """`value` as an int; numpy's and torch's whole numbers are welcome, booleans and floats are not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or number < 0:
        raise ValueError(f"{what} {value!r}; expected whole numbers from 0")
    return number


def _checked_heads(heads: Iterable[tuple[int, int]], heads_per_layer: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for entry in _several(heads, "heads", "(layer, head) pairs"):
        try:
            layer, head = entry
        except (TypeError, ValueError):
            raise ValueError(f"{entry!r} is not a (layer, head) pair") from None
        layer, head = _whole(layer, f"head {entry!r} has layer"), _whole(head, f"head {entry!r} has index")
        if layer >= len(heads_per_layer):
            raise ValueError(f"head {(layer, head)}: there are {len(heads_per_layer)} layers, counted from 0")
        if head >= heads_per_layer[layer]:
            raise ValueError(f"head {(layer, head)}: layer {layer} has {heads_per_layer[layer]} heads, counted from 0")
        pairs.append((layer, head))
    pairs.sort()
    for first, second in zip(pairs, pairs[1:], strict=False):
        if first == second:
            raise ValueError(f"head {first} is given twice")
    return tuple(pairs)


def _several(value: Any, what: str, of: str) -> list:
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}; expected {of}") from None
