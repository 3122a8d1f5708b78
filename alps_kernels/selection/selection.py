"""Which heads train: a set of (layer, head) pairs, and what it means on a model."""

from __future__ import annotations

import math
import operator
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..layout import HeadLayout, LayerSummary
from ..tensors import read_json, write_json
from .binding import BoundSelection, SelectionCount, bind

FORMAT, VERSION = "alps_kernels.heads", 1
KV_POLICIES = ("any", "none", "all")
PARTS = ("q", "k", "v", "o")
REST = ("frozen", "trainable")

# What trains of each model and its `rest`, as last told, so that no later call needs to be told again.
_TRAINED: WeakKeyDictionary[nn.Module, tuple[HeadSelection, str]] = WeakKeyDictionary()


def remember(model: nn.Module, selection: HeadSelection, rest: str) -> None:
    """Let `selection_of(model)` answer `selection`, and `bind` default to `rest`."""
    _TRAINED[model] = (selection, rest)


def remembered(model: nn.Module) -> tuple[HeadSelection, str] | None:
    """The selection and `rest` that `remember` was last given of this very model."""
    return _TRAINED.get(model)


def forget(model: nn.Module) -> None:
    """Undo `remember`."""
    _TRAINED.pop(model, None)


def selection_of(model: nn.Module) -> HeadSelection | None:
    """The selection that `freeze`, `slice_heads` or a patch last put on this very model, if any did."""
    return _TRAINED[model][0] if model in _TRAINED else None


def top_count(ratio: float, n: int) -> int:
    """K = ceil(ratio n) (ALPS, step 2), blind to the last bits of a float: 0.1 of 270 is 27.

    Raises:
        ValueError: ratio is not in [0, 1].
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio!r}; expected a number from 0 to 1")
    return min(n, max(int(ratio > 0), math.ceil(round(ratio * n, 9))))


def resolve_count(n: int, ratio: float | None, k: int | None) -> int:
    """The number of heads meant by exactly one of `ratio` and `k`, out of `n`.

    Raises:
        ValueError: both or neither is given, or it is out of range.
    """
    if (ratio is None) == (k is None):
        raise ValueError("give either a ratio or k, the number of heads")
    if k is None:
        return top_count(ratio, n)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= n:
        raise ValueError(f"k is {k!r}; expected a whole number from 0 to {n}")
    return k


class HeadSelection:
    """A set of attention heads of a model, ordered by (layer, head).

    Args:
        heads: (layer, head) pairs, zero-based; duplicates and pairs out of range are refused.
        heads_per_layer: the number of query heads of every attention layer of the model.
        kv: when a key/value group trains: "any" of its query heads is selected (the paper),
            "none" (never), "all" of them are.
        parts: which projections of a head train, of "q", "k", "v" and "o". A bias goes with
            its projection, an output gate with "q". The paper trains q, k and v.
        summary: the layers' sizes (`HeadLayout.summary()`), for the honest count of
            parameters where no model is at hand.
        provenance: anything JSON about where the selection is from.

    Raises:
        ValueError, TypeError: naming the head, count or policy that is wrong.
    """

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
        if kv not in KV_POLICIES:
            raise ValueError(f"kv is {kv!r}; expected one of {KV_POLICIES}")
        if not isinstance(parts, (list, tuple, set, frozenset)) or not parts or not all(part in PARTS for part in parts):
            raise ValueError(f"parts is {parts!r}; expected a sequence of some of {PARTS}")
        self.kv = kv
        self.parts = tuple(part for part in PARTS if part in parts)
        self.summary = None if summary is None else tuple(_several(summary, "summary", "what HeadLayout.summary() returns"))
        if self.summary is not None and not all(isinstance(layer, LayerSummary) for layer in self.summary):
            raise TypeError("summary is no list of LayerSummary; expected what HeadLayout.summary() returns")
        if self.summary is not None and tuple(len(s.group_of) for s in self.summary) != self.heads_per_layer:
            raise ValueError("summary and heads_per_layer disagree on the number of heads")
        if provenance is not None and not isinstance(provenance, dict):
            raise TypeError(f"provenance is a {type(provenance).__name__}; expected a dict")
        self.provenance = provenance

    # -- baselines ---------------------------------------------------------------------------

    @classmethod
    def random(cls, like: Any, ratio: float | None = None, *, k: int | None = None, seed: int = 0,
               **options) -> HeadSelection:
        """K heads drawn evenly from the whole model; the same seed draws the same heads.

        Args:
            like: a HeadLayout, HeadScores or HeadSelection of the model.
            options: `kv`, `parts` and `provenance` of the new selection.
        """
        pairs = _all_pairs(_heads_of(like))
        chosen = random.Random(seed).sample(pairs, resolve_count(len(pairs), ratio, k))
        return cls._like(like, chosen, options)

    @classmethod
    def layer_consistent(cls, like: Any, ratio: float | None = None, *, k: int | None = None, seed: int = 0,
                         **options) -> HeadSelection:
        """The same number of random heads in every layer: ceil(ratio n_heads of the layer), or `k`."""
        rng = random.Random(seed)
        chosen = [
            (layer, head)
            for layer, n in enumerate(_heads_of(like))
            for head in rng.sample(range(n), resolve_count(n, ratio, k))
        ]
        return cls._like(like, chosen, options)

    @classmethod
    def all(cls, like: Any, **options) -> HeadSelection:
        """Every head."""
        return cls._like(like, _all_pairs(_heads_of(like)), options)

    @classmethod
    def none(cls, like: Any, **options) -> HeadSelection:
        """No head."""
        return cls._like(like, [], options)

    @classmethod
    def _like(cls, like: Any, heads: Iterable[tuple[int, int]], options: dict[str, Any]) -> HeadSelection:
        summary = like.summary() if isinstance(like, HeadLayout) else getattr(like, "summary", None)
        return cls(heads, _heads_of(like), **{"summary": summary, **options})

    # -- a set -------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.heads)

    def __len__(self) -> int:
        return len(self.heads)

    def __contains__(self, head: object) -> bool:
        return head in self._set

    @property
    def _set(self) -> frozenset[tuple[int, int]]:
        return frozenset(self.heads)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSelection):
            return NotImplemented
        return (self.heads, self.heads_per_layer, self.kv, self.parts) == (
            other.heads, other.heads_per_layer, other.kv, other.parts)

    def __hash__(self) -> int:
        return hash((self.heads, self.heads_per_layer, self.kv, self.parts))

    def __or__(self, other: HeadSelection) -> HeadSelection:
        return self._combine(other, self._set | self._other(other))

    def __and__(self, other: HeadSelection) -> HeadSelection:
        return self._combine(other, self._set & self._other(other))

    def __sub__(self, other: HeadSelection) -> HeadSelection:
        return self._combine(other, self._set - self._other(other))

    def __xor__(self, other: HeadSelection) -> HeadSelection:
        return self._combine(other, self._set ^ self._other(other))

    def __invert__(self) -> HeadSelection:
        return self._combine(self, set(_all_pairs(self.heads_per_layer)) - self._set)

    def _other(self, other: HeadSelection) -> frozenset[tuple[int, int]]:
        if not isinstance(other, HeadSelection):
            raise TypeError(f"expected a HeadSelection, not {type(other).__name__}")
        for name in ("heads_per_layer", "kv", "parts"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"the two selections differ in {name}: {mine} and {theirs}")
        return other._set

    def _combine(self, other: HeadSelection, heads: Iterable[tuple[int, int]]) -> HeadSelection:
        return HeadSelection(heads, self.heads_per_layer, kv=self.kv, parts=self.parts,
                             summary=self.summary or other.summary)

    # -- on a model --------------------------------------------------------------------------

    def bind(self, model: nn.Module, *, rest: str | None = None, layout: HeadLayout | None = None) -> BoundSelection:
        """What this selection trains of `model`: parameters and ranges, for `HeadAdamW`.

        Args:
            rest: "frozen": nothing but the selected slices. "trainable": everything but the
                other heads' slices. Default: what `freeze` was last told of this model, else
                "frozen".
            layout: the model's layout where it is already known.

        Raises:
            LayoutError: the heads of `model` cannot be located.
            ValueError: `model` has other heads than this selection was made for.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
        if layout is not None and not isinstance(layout, HeadLayout):
            raise TypeError(f"layout is a {type(layout).__name__}; expected what find_heads(model) returns")
        return bind(self, model, _checked_rest(_TRAINED.get(model, (self, "frozen"))[1] if rest is None else rest), layout)

    def freeze(self, model: nn.Module, rest: str = "frozen", *, layout: HeadLayout | None = None) -> BoundSelection:
        """Set `requires_grad` of every floating-point parameter to whether something of it trains.

        The weights are left alone. A parameter that trains in part still gets a full gradient:
        it is `HeadAdamW` that moves the selected slices only.

        Returns:
            The bound selection, as `bind(model, rest=rest)` gives it.
        """
        bound = self.bind(model, rest=_checked_rest(rest), layout=layout)
        _warn_of_ties(model, bound)
        trained = {id(part.param) for part in bound.params}
        before = [(param, param.requires_grad) for param in model.parameters() if param.is_floating_point()]
        try:
            for param, _ in before:
                param.requires_grad_(id(param) in trained)
            remember(model, self, rest)
        except BaseException:  # an interrupt
            for param, trains in before:
                param.requires_grad_(trains)
            raise
        return bound

    # -- files -------------------------------------------------------------------------------

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
    def from_json(cls, document: dict[str, Any]) -> HeadSelection:
        """What `to_json` gave.

        Raises:
            ValueError: the document holds no selection, or heads that cannot be.
        """
        try:
            summary = document.get("summary")
            provenance = document.get("provenance")
            if provenance is not None and not isinstance(provenance, dict):
                raise TypeError("provenance is not an object")
            return cls(
                [tuple(head) for head in document["heads"]], document["heads_per_layer"],
                kv=document["kv"], parts=document["parts"], provenance=provenance,
                summary=None if summary is None else [LayerSummary.from_json(s) for s in summary],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"not a valid head selection: {what}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Write the selection as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeadSelection:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, foreign or holds heads that cannot be; it names the file.
        """
        document = read_json(path, FORMAT, VERSION)
        try:
            return cls.from_json(document)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is {error}") from error

    # -- for people --------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"HeadSelection({len(self)} of {sum(self.heads_per_layer)} heads, kv={self.kv!r}, parts={self.parts})"

    def __str__(self) -> str:
        """The selected heads of every layer, and the honest share where sizes are known."""
        n, total = len(self), sum(self.heads_per_layer)
        lines = [f"{n} of {total} heads ({n / max(total, 1):.1%}), kv policy {self.kv!r}, parts {'/'.join(self.parts)}"]
        if self.summary is not None:
            lines.append(str(self.count()))
        for layer, width in enumerate(self.heads_per_layer):
            chosen = [head for owner, head in self.heads if owner == layer]
            if chosen:
                name = f" {self.summary[layer].module}" if self.summary is not None else ""
                lines.append(f"  layer {layer:3d}{name}: {', '.join(map(str, chosen))} of {width}")
        return "\n".join(lines)

    def count(self, layout: HeadLayout | None = None) -> SelectionCount:
        """How many parameters train, counted on the layers' sizes.

        Args:
            layout: the model's layout; default: the summary this selection carries.

        Raises:
            ValueError: neither is there, or the layout is of another model.
        """
        summary = self.summary if layout is None else layout.summary()
        if summary is None:
            raise ValueError("this selection carries no sizes: give the model's layout")
        if tuple(len(s.group_of) for s in summary) != self.heads_per_layer:
            raise ValueError("the layout is of a model with other heads")
        return SelectionCount.of(self, summary)


def _all_pairs(heads_per_layer: Sequence[int]) -> list[tuple[int, int]]:
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


def _heads_of(like: Any) -> tuple[int, ...]:
    if not hasattr(like, "heads_per_layer"):
        raise TypeError(f"like is a {type(like).__name__}; expected a HeadLayout, HeadScores or HeadSelection")
    return like.heads_per_layer


def _several(value: Any, what: str, of: str) -> list:
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{what} is {value!r}; expected {of}") from None


def _warn_of_ties(model: nn.Module, bound: BoundSelection) -> None:
    """Warns where a parameter that holds selected heads is in several places of the model."""
    places: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    for part in bound.params:
        if (bound.rest == "frozen" or not part.full) and len(names := places.get(id(part.param), [])) > 1:
            warnings.warn(f"{names[0]} holds selected heads and is tied to {', '.join(names[1:])}: what trains there "
                          "changes here", stacklevel=3)


def _checked_rest(rest: Any) -> str:
    if rest not in REST:
        raise ValueError(f"rest is {rest!r}; expected one of {REST}")
    return rest
