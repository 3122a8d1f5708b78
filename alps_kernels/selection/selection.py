"""`HeadSelection`: which heads train, baselines, what it means on a model, files; the last one of each model."""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..layout import HeadLayout
from ..tensors import check_choice, check_type, read_json, write_json
from .binding import BoundSelection, SelectionCount, bind
from .head_set import FORMAT, VERSION, HeadSet, all_pairs

REST = ("frozen", "trainable")
Last = tuple[HeadSet, str]
_LAST: WeakKeyDictionary[nn.Module, Last] = WeakKeyDictionary()  # the last selection and `rest` of each model


def remember(model: nn.Module, last: Last | None) -> None:
    """Let `selection_of(model)` answer this selection, and `bind` default to this `rest`; None: forget both."""
    if last is None:
        _LAST.pop(model, None)
    else:
        _LAST[model] = last


def remembered(model: nn.Module) -> Last | None:
    """The selection and `rest` that `remember` was last given of this very model."""
    return _LAST.get(model)


def selection_of(model: nn.Module) -> HeadSet | None:
    """The selection that `freeze`, `slice_heads` or a patch last put on this very model, if any did."""
    return _LAST.get(model, (None, None))[0]


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


class HeadSelection(HeadSet):
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

    # -- baselines ---------------------------------------------------------------------------

    @classmethod
    def random(cls, like: Any, ratio: float | None = None, *, k: int | None = None, seed: int = 0,
               **options) -> HeadSelection:
        """K heads drawn evenly from the whole model; the same seed draws the same heads.

        Args:
            like: a HeadLayout, HeadScores or HeadSelection of the model.
            options: `kv`, `parts` and `provenance` of the new selection.
        """
        pairs = all_pairs(_heads_of(like))
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
        return cls._like(like, all_pairs(_heads_of(like)), options)

    @classmethod
    def none(cls, like: Any, **options) -> HeadSelection:
        """No head."""
        return cls._like(like, [], options)

    @classmethod
    def _like(cls, like: Any, heads: Iterable[tuple[int, int]], options: dict[str, Any]) -> HeadSelection:
        summary = like.summary() if isinstance(like, HeadLayout) else getattr(like, "summary", None)
        return cls(heads, _heads_of(like), **{"summary": summary, **options})

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
        check_type("the model", model, nn.Module, "a torch.nn.Module")
        check_type("layout", layout, (HeadLayout, type(None)), "what find_heads(model) returns")
        rest = (remembered(model) or (self, "frozen"))[1] if rest is None else rest
        check_choice("rest", rest, REST)
        return bind(self, model, rest, layout)

    def freeze(self, model: nn.Module, rest: str = "frozen", *, layout: HeadLayout | None = None) -> BoundSelection:
        """Set `requires_grad` of every floating-point parameter to whether something of it trains.

        The weights are left alone. A parameter that trains in part still gets a full gradient:
        it is `HeadAdamW` that moves the selected slices only.

        Returns:
            The bound selection, as `bind(model, rest=rest)` gives it.
        """
        check_choice("rest", rest, REST)
        bound = self.bind(model, rest=rest, layout=layout)
        _warn_of_ties(model, bound)
        trained = {id(part.param) for part in bound.params}
        before = [(param, param.requires_grad) for param in model.parameters() if param.is_floating_point()]
        last = remembered(model)
        try:
            for param, _ in before:
                param.requires_grad_(id(param) in trained)
            remember(model, (self, rest))
            return bound
        except BaseException:  # an interrupt
            for param, trains in before:
                param.requires_grad_(trains)
            remember(model, last)
            raise

    # -- files -------------------------------------------------------------------------------

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

    def __str__(self) -> str:
        """The selected heads of every layer, and the honest share where sizes are known."""
        n, total = len(self), sum(self.heads_per_layer)
        lines = [f"{n} of {total} heads ({n / max(total, 1):.1%}), kv policy {self.kv!r}, parts {'/'.join(self.parts)}"]
        if self.summary is not None:
            lines.append(str(self.count()))
        for layer, width in enumerate(self.heads_per_layer):
            if chosen := self.in_layer(layer):
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


HeadSelection._result = HeadSelection


def _heads_of(like: Any) -> tuple[int, ...]:
    if not hasattr(like, "heads_per_layer"):
        raise TypeError(f"like is a {type(like).__name__}; expected a HeadLayout, HeadScores or HeadSelection")
    return like.heads_per_layer


def _warn_of_ties(model: nn.Module, bound: BoundSelection) -> None:
    """Warns where a parameter that holds selected heads is in several places of the model."""
    places: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(param), []).append(name)
    for part in bound.params:
        if (bound.rest == "frozen" or not part.full) and len(names := places.get(id(part.param), [])) > 1:
            warnings.warn(f"{names[0]} holds selected heads and is tied to {', '.join(names[1:])}: what trains there "
                          "changes here", stacklevel=3)
