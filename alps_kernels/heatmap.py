"""A picture of one score per attention head: layer x head, the selected heads framed."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomic

if TYPE_CHECKING:
    from .scores import HeadScores
    from .selection import HeadSelection

WIDE = 50  # a spread of scores beyond this factor is coloured on a logarithmic scale


def draw(scores: HeadScores, path: str | os.PathLike, heads: HeadSelection | None = None) -> None:
    """Write the heat map of `scores` to `path`; its suffix says in which format.

    Args:
        heads: the heads to frame; of the same model.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `heads` is of another model, nothing was scored, or matplotlib knows no such format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'alps-kernels[plot]'") from error
    if heads is not None and heads.heads_per_layer != scores.heads_per_layer:
        raise ValueError(f"the heads are of a model with {list(heads.heads_per_layer)} heads per layer, "
                         f"the scores of one with {list(scores.heads_per_layer)}")
    if not len(scores):
        raise ValueError("no head was scored, so there is nothing to draw")
    grid = scores.matrix()[list(scores.layers)]
    n_layers, n_heads = grid.shape
    figure = Figure(figsize=(min(4.5 + 0.24 * n_heads, 16), min(2.2 + 0.24 * n_layers, 22)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.9")  # layers of fewer heads end here
    image = axes.imshow(grid.numpy(), aspect="auto", cmap="viridis", interpolation="nearest", norm=_norm(scores))
    figure.colorbar(image, ax=axes, label=f"{scores.metric} of {scores.representation}")
    if heads is not None:
        _frame(axes, scores, heads)
    axes.set(xlabel="head", ylabel="layer")
    axes.set_xticks(_ticks(n_heads))
    places = _ticks(n_layers)
    axes.set_yticks(places, [str(scores.layers[place]) for place in places])
    axes.set_title(_title(scores, heads), fontsize=10, wrap=True)
    buffer, kind = io.BytesIO(), Path(path).suffix.lstrip(".").lower() or "png"
    figure.savefig(buffer, format=kind, dpi=200)
    write_atomic(path, buffer.getvalue())


def _norm(scores: HeadScores):
    """Logarithmic where all scores are positive and far apart, else linear."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = scores.tensor.min().item(), scores.tensor.max().item()
    return (LogNorm if 0 < low < high / WIDE else Normalize)(low, high)


def _frame(axes, scores: HeadScores, heads: HeadSelection) -> None:
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


def _title(scores: HeadScores, heads: HeadSelection | None) -> str:
    framed = "" if heads is None else f"\n{len(heads)} of {sum(heads.heads_per_layer)} heads selected (framed)"
    return scores.title.replace(": ", "\n", 1) + framed
