"""Plots of scores and of training, for screen and black-and-white print; needs matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..selection import HeadSelection
from ..tensors import check_choice, write_atomic

KINDS = ("heatmap", "histogram", "overlap")
WIDE = 50  # a spread of scores beyond this factor is shown on a logarithmic scale
TAIL = 0.02  # share of heads at either end that may lie beyond the scale of colours
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")


class Scores(Protocol):
    """What is drawn of `HeadScores`, which see."""

    tensor: Tensor
    metric: str
    representation: str
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    heads_per_layer: tuple[int, ...]
    provenance: dict[str, Any] | None
    title: str

    def matrix(self) -> Tensor: ...
    def ranking(self) -> list[tuple[int, int]]: ...
    def compare(self, other: Any, ratio: float) -> Any: ...


def plot_scores(scores: Scores, path: str | os.PathLike, heads: HeadSelection | None, kind: str, other: Scores | None,
                ratio: float) -> None:
    """See `HeadScores.plot`."""
    check_choice("kind", kind, KINDS)
    if (kind == "overlap") != (other is not None):
        raise ValueError("kind='overlap' draws these scores and other: give both or neither")
    if heads is not None and other is None and heads.heads_per_layer != scores.heads_per_layer:
        raise ValueError(f"the heads are of a model with {list(heads.heads_per_layer)} heads per layer, "
                         f"the scores of one with {list(scores.heads_per_layer)}")
    if not scores.heads:
        raise ValueError("no head was scored, so there is nothing to draw")
    if other is not None:
        figure = _overlap(scores, other, ratio)
    else:
        figure = (_histogram if kind == "histogram" else _heat_map)(scores, heads)
    save_figure(figure, path)


def _heat_map(scores: Scores, heads: HeadSelection | None):
    """Layer x head, coloured by score.

    A score beyond the colour scale (the outermost 2 % of heads at most) has the colour of its end.
    """
    figure, axes = _grid(scores)
    norm, beyond = _norm(scores)
    image = axes.imshow(scores.matrix()[list(scores.layers)].numpy(), aspect="auto", cmap="viridis",
                        interpolation="nearest", norm=norm)
    figure.colorbar(image, ax=axes, label=f"{scores.metric} of {scores.representation}", extend=beyond)
    if heads is not None:
        _frame(axes, scores, heads)
    axes.set_title(_title(scores, heads, "framed"), fontsize=10, wrap=True)
    return figure


def _histogram(scores: Scores, heads: HeadSelection | None):
    """Heads per interval of score, those of `heads` hatched."""
    import numpy as np

    figure = new_figure(6.4, 3.8)
    axes = figure.add_subplot()
    norm, beyond = _norm(scores)
    low, high = norm.vmin, norm.vmax
    values = scores.tensor.numpy().clip(low, high)
    spread = type(norm).__name__ == "LogNorm"
    edges = np.geomspace(low, high, 41) if spread else np.linspace(low, high if high > low else low + 1, 41)
    chosen = set() if heads is None else set(heads)
    picked = np.array([head in chosen for head in scores.heads], dtype=bool)
    parts = [values[~picked], values[picked]] if heads is not None else [values]
    labels = [f"not selected ({len(parts[0])})", f"selected ({int(picked.sum())})"][:len(parts)]
    _, _, bars = axes.hist(parts, bins=edges, stacked=True, label=labels, color=["0.75", "tab:red"][:len(parts)],
                           edgecolor="black", linewidth=0.4)
    if heads is not None:
        for bar in bars[1]:
            bar.set_hatch("////")
        axes.legend()
    outside = "" if beyond == "neither" else " (the outermost bars hold what lies beyond)"
    axes.set(xlabel=f"{scores.metric} of {scores.representation}{outside}", ylabel="heads",
             xscale="log" if spread else "linear")
    axes.set_title(_title(scores, heads, "hatched"), fontsize=10, wrap=True)
    return figure


def _overlap(scores: Scores, other: Scores, ratio: float):
    """Which heads are in the top of one task, of the other and of both, layer x head."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    alike = scores.compare(other, ratio=ratio)
    first, second = (set(s.ranking()[:alike.k]) for s in (scores, other))
    figure, axes = _grid(scores)
    grid = scores.matrix()[list(scores.layers)].clone()
    row = {layer: place for place, layer in enumerate(scores.layers)}
    signs = {1: "1", 2: "2", 3: "B"}
    for layer, head in scores.heads:
        which = ((layer, head) in first) + 2 * ((layer, head) in second)
        grid[row[layer], head] = which
        if which:
            axes.text(head, row[layer], signs[which], ha="center", va="center", fontsize=7,
                      color="white" if which == 3 else "black")
    shades = ["white", "#9ecae1", "#fdae6b", "#3f007d"]
    axes.imshow(grid.numpy(), aspect="auto", cmap=ListedColormap(shades), vmin=-0.5, vmax=3.5,
                interpolation="nearest")
    axes.set_xticks([x - 0.5 for x in range(grid.shape[1])], minor=True)
    axes.set_yticks([y - 0.5 for y in range(grid.shape[0])], minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    names = [f"1: {_task(scores, 'first')} alone", f"2: {_task(other, 'second')} alone", "B: both"]
    counts = [alike.k - alike.shared, alike.k - alike.shared, alike.shared]
    figure.legend(handles=[Patch(facecolor=shade, edgecolor="black", label=f"{name} ({n})")
                           for shade, name, n in zip(shades[1:], names, counts, strict=True)],
                  loc="outside lower center", fontsize=8)
    axes.set_title(f"top {alike.k} heads of two tasks by {scores.metric}\n{alike.shared} shared, Jaccard "
                   f"{alike.jaccard:.2f}, Spearman {alike.spearman:.2f} over all", fontsize=10, wrap=True)
    return figure


def curves(path: str | os.PathLike, lines: Mapping[str, Sequence[tuple[float, float]]], *, xlabel: str = "step",
           ylabel: str = "loss", title: str = "", log: bool = False) -> None:
    """Write training curves; each line has a style of its own, so that print tells them apart.

    Args:
        lines: (x, y) points by label.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or matplotlib knows no such format.
    """
    if not any(len(points) for points in lines.values()):
        raise ValueError("no curve has a point, so there is nothing to draw")
    figure = new_figure(6.4, 4.0)
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.6, linestyle=LINES[index % len(LINES)],
                  color=f"C{index}")
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(color="0.85", linewidth=0.6)
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=10, wrap=True)
    save_figure(figure, path)


def memory_bars(path: str | os.PathLike, rows: Mapping[str, Mapping[str, float]], *, title: str = "") -> None:
    """Write stacked bars of memory: one bar a method, one hatch a sort of bytes.

    Args:
        rows: by method the bytes of each sort ("gradients", "optimizer state", ...).

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or matplotlib knows no such format.
    """
    if not rows:
        raise ValueError("no method was given, so there is nothing to draw")
    sorts = list(dict.fromkeys(sort for parts in rows.values() for sort in parts))
    largest = max(sum(parts.values()) for parts in rows.values())
    unit, name = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    figure = new_figure(7.0, 1.6 + 0.45 * len(rows))
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for index, sort in enumerate(sorts):
        widths = [parts.get(sort, 0) / unit for parts in rows.values()]
        axes.barh(range(len(rows)), widths, left=left, label=sort, hatch=HATCHES[index % len(HATCHES)],
                  color=f"C{index}", edgecolor="black", linewidth=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.3g}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(name)
    axes.set_title(title, fontsize=10, wrap=True)
    figure.legend(loc="outside lower center", ncols=min(len(sorts), 4), fontsize=8)
    save_figure(figure, path)


def new_figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'alps-kernels[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: str | os.PathLike) -> None:
    buffer, kind = io.BytesIO(), Path(path).suffix.lstrip(".").lower() or "png"
    figure.savefig(buffer, format=kind, dpi=200)
    write_atomic(path, buffer.getvalue())


def _grid(scores: Scores):
    """Figure and axes for one cell per head, layers downwards."""
    n_layers, n_heads = len(scores.layers), max(scores.heads_per_layer[layer] for layer in scores.layers)
    figure = new_figure(min(4.5 + 0.24 * n_heads, 16), min(2.2 + 0.24 * n_layers, 22))
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")  # layers of fewer heads end here
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(_ticks(n_heads))
    places = _ticks(n_layers)
    axes.set_yticks(places, [str(scores.layers[place]) for place in places])
    return figure, axes


def _norm(scores: Scores):
    """The scale of colours, and where scores lie beyond it: "neither", "min", "max" or "both".

    Logarithmic where all scores are positive and far apart. It ends before the outermost heads where
    one of them alone would take most of it.
    """
    from matplotlib.colors import LogNorm, Normalize

    ordered = scores.tensor.sort().values
    n, cut = len(ordered), int(TAIL * len(ordered))
    low, high = ordered[0].item(), ordered[-1].item()
    inner_low, inner_high = ordered[cut].item(), ordered[n - 1 - cut].item()
    kind = LogNorm if 0 < low < high / WIDE else Normalize
    if kind is LogNorm:
        ends = {"min": inner_low / low > inner_high / inner_low, "max": high / inner_high > inner_high / inner_low}
    else:
        ends = {"min": inner_low - low > inner_high - inner_low, "max": high - inner_high > inner_high - inner_low}
    if inner_low == inner_high:
        ends = {"min": False, "max": False}
    beyond = "both" if all(ends.values()) else next((end for end, is_far in ends.items() if is_far), "neither")
    return kind(inner_low if ends["min"] else low, inner_high if ends["max"] else high), beyond


def _frame(axes, scores: Scores, heads: HeadSelection) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    seen_in_print = [Stroke(linewidth=3.2, foreground="white"), Normal()]
    row = {layer: place for place, layer in enumerate(scores.layers)}
    for layer, head in heads:
        if layer in row:
            axes.add_patch(Rectangle((head - 0.42, row[layer] - 0.42), 0.84, 0.84, fill=False, edgecolor="red",
                                     linewidth=1.6, path_effects=seen_in_print))


def _ticks(n: int) -> list[int]:
    """At most sixteen evenly spaced places, zero first."""
    return list(range(0, n, -(-n // 16)))


def _title(scores: Scores, heads: HeadSelection | None, sign: str) -> str:
    marked = "" if heads is None else f"\n{len(heads)} of {sum(heads.heads_per_layer)} heads selected ({sign})"
    return scores.title.replace(": ", "\n", 1) + marked


def _task(scores: Scores, fallback: str) -> str:
    models = (scores.provenance or {}).get("models")
    return models["task"]["name"] if models else fallback
