"""`HeadScores`: one number per attention head, where it is from, and what can be read off it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout import LayerSummary
from ..selection import HeadSelection, resolve_count
from ..tensors import check_choice
from . import plots, score_files
from .comparison import Comparison, spearman

SCOPES = ("model", "layer")
SHOWN = 20  # heads that printing lists


class HeadScores:
    """How far every scored head moved from the base to the task model; larger is farther.

    Args:
        tensor: finite scores, one per head of `layers`, layer after layer, head after head.
        layers: the attention layers that were scored, ascending indices into the layout.
        heads_per_layer: query heads of every attention layer of the model, scored or not.
        metric, representation, temperature: what was computed; see `score_heads`.
        summary: sizes and module names of every layer (`HeadLayout.summary()`).
        provenance: anything JSON about the models, versions and date.

    Attributes:
        tensor: float64 [scored heads] on the CPU.

    Raises:
        ValueError: the counts disagree, or a score is not finite; it names the head.
    """

    def __init__(
        self,
        tensor: Tensor | Sequence[float],
        layers: Sequence[int],
        heads_per_layer: Sequence[int],
        *,
        metric: str,
        representation: str = "projection",
        temperature: float = 1.0,
        summary: Sequence[LayerSummary] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        # A selection of no head checks the counts and the summary as every selection does.
        model = HeadSelection([], heads_per_layer, summary=summary, provenance=provenance)
        self.heads_per_layer, self.summary = model.heads_per_layer, model.summary
        for name, value in (("metric", metric), ("representation", representation)):
            if not isinstance(value, str):
                raise TypeError(f"{name} is {value!r}; expected its name")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}; expected a positive number")
        self.layers = _tuple_of(layers)
        known = range(len(self.heads_per_layer))
        indices = all(type(i) is int and i in known for i in self.layers)
        if not indices or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)} are not ascending indices below {len(known)}")
        self.heads = tuple((layer, head) for layer in self.layers for head in range(self.heads_per_layer[layer]))
        self.tensor = _float64(tensor)
        if self.tensor.shape != (len(self.heads),):
            raise ValueError(f"{list(self.tensor.shape)} scores for {len(self.heads)} heads")
        if not self.tensor.isfinite().all():
            position = int((~self.tensor.isfinite()).nonzero()[0])
            raise ValueError(f"the score of head {self.heads[position]} is {self.tensor[position].item()}")
        self.metric, self.representation, self.temperature = metric, representation, float(temperature)
        self.provenance = provenance

    # -- one number per head -----------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.heads)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The scored heads by position."""
        return iter(self.heads)

    @property
    def values(self) -> dict[tuple[int, int], float]:
        """The score of every scored head, by position."""
        return dict(zip(self.heads, self.tensor.tolist(), strict=True))

    def __getitem__(self, head: tuple[int, int]) -> float:
        """The score of one (layer, head).

        Raises:
            IndexError: there is no such head, or its layer was not scored.
        """
        if not isinstance(head, tuple) or len(head) != 2:
            raise TypeError(f"{head!r} is no (layer, head) pair")
        layer, index = head
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not scored; the scored ones are {list(self.layers)}")
        if not isinstance(index, int) or not 0 <= index < self.heads_per_layer[layer]:
            raise IndexError(f"head {index} is not in layer {layer}, which has {self.heads_per_layer[layer]} heads")
        return self.by_layer()[layer][int(index)].item()

    def by_layer(self) -> dict[int, Tensor]:
        """The scores of every scored layer, float64 [heads of the layer]."""
        sizes = [self.heads_per_layer[layer] for layer in self.layers]
        return dict(zip(self.layers, self.tensor.split(sizes), strict=True))

    def matrix(self) -> Tensor:
        """float64 [layers of the model, most heads of a layer], NaN where there is no score."""
        shape = len(self.heads_per_layer), max(self.heads_per_layer, default=0)
        grid = torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
        for layer, scores in self.by_layer().items():
            grid[layer, :len(scores)] = scores
        return grid

    def ranking(self) -> list[tuple[int, int]]:
        """All scored heads, the highest score first, ties by position."""
        return [self.heads[i] for i in _order(self.tensor)]

    def rows(self) -> list[dict[str, Any]]:
        """One dict per scored head, by position: layer, head, group, module, score, rank (from 1).

        `pandas.DataFrame(scores.rows())` is the table.
        """
        rank = {head: place for place, head in enumerate(self.ranking(), start=1)}
        return [
            {"layer": layer, "head": head,
             "group": None if self.summary is None else self.summary[layer].group_of[head],
             "module": None if self.summary is None else self.summary[layer].module,
             "score": score, "rank": rank[layer, head]}
            for (layer, head), score in self.values.items()
        ]

    # -- choosing and comparing --------------------------------------------------------------

    def top(self, ratio: float | None = None, *, k: int | None = None, scope: str = "model", kv: str = "any",
            parts: Sequence[str] = ("q", "k", "v")) -> HeadSelection:
        """The heads that moved most: ALPS, step 2.

        Args:
            ratio: keep K = ceil(ratio n) of the n scored heads.
            k: keep this many instead.
            scope: "model": ranked over all scored heads; "layer": K of every scored layer.
            kv, parts: of the selection, see `HeadSelection`.

        Raises:
            ValueError: both or neither of ratio and k, one out of range, an unknown scope.
        """
        check_choice("scope", scope, SCOPES)
        if scope == "model":
            heads = self.ranking()[:resolve_count(len(self), ratio, k)]
        else:
            heads = [(layer, head) for layer, scores in self.by_layer().items()
                     for head in _order(scores)[:resolve_count(len(scores), ratio, k)]]
        provenance = {"method": "top", "ratio": ratio, "k": k, "scope": scope, "metric": self.metric,
                      "representation": self.representation, "temperature": self.temperature,
                      "scores": self.provenance}
        return HeadSelection(heads, self.heads_per_layer, kv=kv, parts=parts, summary=self.summary,
                             provenance=provenance)

    def compare(self, other: HeadScores, ratio: float | None = None, *, k: int | None = None) -> Comparison:
        """How alike two rankings of the same heads are; the top is `ratio` (default 0.1) or `k`.

        Raises:
            ValueError: the two do not score the same heads.
        """
        if not isinstance(other, HeadScores):
            raise TypeError(f"expected HeadScores, not {type(other).__name__}")
        if self.heads != other.heads:
            raise ValueError(f"these are scores of {len(self)} heads in {len(self.layers)} layers, "
                             f"the others of {len(other)} heads in {len(other.layers)} layers")
        n = resolve_count(len(self), 0.1 if ratio is None and k is None else ratio, k)
        mine, theirs = (set(scores.ranking()[:n]) for scores in (self, other))
        both = len(mine & theirs)
        return Comparison(n, both, both / len(mine | theirs) if n else 1.0, spearman(self.tensor, other.tensor))

    # -- files -------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write all of it, every bit of every score, atomically; the suffix decides how.

        Raises:
            ValueError: the suffix is neither .json nor .safetensors.
        """
        score_files.write(path, self.tensor, {
            "metric": self.metric, "representation": self.representation, "temperature": self.temperature,
            "layers": list(self.layers), "heads_per_layer": list(self.heads_per_layer),
            "summary": None if self.summary is None else [layer.to_json() for layer in self.summary],
            "provenance": self.provenance,
        })

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeadScores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, foreign or contradicts itself; the message names the file.
        """
        document = score_files.read(path)
        try:
            values, entries = score_files.checked(document)
            if entries["summary"] is not None:
                entries["summary"] = [LayerSummary.from_json(layer) for layer in entries["summary"]]
            return cls(values, **entries)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{os.fspath(path)} does not hold valid head scores: {what}") from error

    # -- for people --------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What was scored, in one line."""
        models = (self.provenance or {}).get("models")
        names = f"{models['base']['name']} to {models['task']['name']}" if models else "unknown models"
        warm = "" if self.temperature == 1 else f", temperature {self.temperature:g}"
        return f"{self.metric} of {self.representation}{warm}: {names}"

    def __repr__(self) -> str:
        return f"HeadScores({len(self)} heads in {len(self.layers)} layers, {self.title})"

    def __str__(self) -> str:
        """The highest scores and how all of them are spread."""
        lines = [f"{self.title}; {len(self)} heads in {len(self.layers)} layers"]
        if not len(self):
            return lines[0]
        lines.append(f"{'rank':>6} {'layer':>6} {'head':>5}  {'score':<16} module")
        for rank, (layer, head) in enumerate(self.ranking()[:SHOWN], start=1):
            module = "" if self.summary is None else self.summary[layer].module
            lines.append(f"{rank:6d} {layer:6d} {head:5d}  {self[layer, head]:<16.9g} {module}".rstrip())
        if len(self) > SHOWN:
            lines.append(f"{'...':>6} {len(self) - SHOWN} more")
        levels = torch.quantile(self.tensor, self.tensor.new_tensor([1.0, 0.9, 0.5, 0.1, 0.0])).tolist()
        names = ("max", "90 %", "median", "10 %", "min")
        lines.append("spread: " + ", ".join(f"{name} {level:.4g}" for name, level in zip(names, levels, strict=True)))
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike, heads: HeadSelection | None = None, *, kind: str = "heatmap",
             other: HeadScores | None = None, ratio: float = 0.10) -> None:
        """Write a plot; its suffix is the format (.png, .pdf, .svg).

        Args:
            heads: the heads to frame ("heatmap") or to hatch ("histogram").
            kind: "heatmap": layer x head. "histogram": how the scores are spread. "overlap": which
                heads are in the top `ratio` of these scores, of `other`, and of both.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the heads or `other` are of another model, or the kind or format is unknown.
        """
        plots.plot_scores(self, path, heads, kind, other, ratio)


def _tuple_of(layers: Any) -> tuple:
    try:
        return tuple(layers)
    except TypeError:
        raise TypeError(f"layers is {layers!r}; expected indices of layers") from None


def _float64(values: Any) -> Tensor:
    """A copy on the CPU."""
    if isinstance(values, Tensor) and (values.is_complex() or values.is_meta or values.layout != torch.strided):
        raise TypeError(f"the scores are {values.dtype} {values.layout} on {values.device}; expected real numbers")
    try:
        return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, RuntimeError, ValueError) as error:
        raise TypeError(f"the scores are a {type(values).__name__} that is no vector of numbers: {error}") from error


def _order(values: Tensor) -> list[int]:
    """Positions by descending value, equal values by position."""
    return torch.sort(values, descending=True, stable=True).indices.tolist()
