"""How far every head moved between two models: checks, and the way to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import reference

METRICS = ("pad", "pad_index", "pad_values", "kl", "js", "cosine", "cosine_weights", "euclidean", "relative")


@dataclass(frozen=True)
class Segment:
    """One matrix of every head of a layer, in the base and in the task model.

    Attributes:
        base, task: [n, rows, cols], any strides, floating point, one device.
        index: which of the n matrices each head reads (a key/value group is read by several).
    """

    base: Tensor
    task: Tensor
    index: tuple[int, ...]


def head_delta(layers: Sequence[Sequence[Segment]], metrics: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
    """Distances between the heads of two models (DESIGN, Scores).

    A head's elements are its segments one after the other, each row-major.

    Args:
        layers: for every layer its segments, e.g. of q, k and v.
        metrics: of `METRICS`.
        temperature: tau of the softmax, positive.

    Returns:
        For every metric float64 [heads of all layers], on the CPU.

    Raises:
        ValueError: segments do not fit together, or a weight is NaN or Inf: it names the head.
    """
    _check(layers, metrics, temperature)
    return reference.head_delta(layers, metrics, temperature=temperature)


def head_delta_projection(layers: Sequence[tuple[Segment, Segment, Segment]], metrics: Sequence[str], *,
                          temperature: float = 1.0) -> dict[str, Tensor]:
    """Distances between the heads' W_h = q_h^T k_g v_g^T, [d, d_v] (paper, eq. 5).

    Args:
        layers: for every layer (q [H, d_k, d], k [G, d_k, d], v [G, d_v, d]).

    Returns and Raises: as `head_delta`.
    """
    _check(layers, metrics, temperature)
    for i, (q, k, v) in enumerate(layers):
        if q.base.shape[1] != k.base.shape[1] or k.base.shape[2] != v.base.shape[2]:
            raise ValueError(f"layer {i}: q {list(q.base.shape)}, k {list(k.base.shape)} and v {list(v.base.shape)} "
                             "do not multiply to q^T k v^T")
    return reference.head_delta_projection(layers, metrics, temperature=temperature)


def _check(layers: Sequence[Sequence[Segment]], metrics: Sequence[str], temperature: float) -> None:
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metric is {unknown[0]!r}; expected one of {METRICS}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; expected a positive number")
    for i, segments in enumerate(layers):
        if not segments or len({len(s.index) for s in segments}) != 1 or not segments[0].index:
            raise ValueError(f"layer {i}: its segments are not of the same one or more heads")
        for s in segments:
            if s.base.ndim != 3 or s.base.shape != s.task.shape or s.base.numel() == 0:
                raise ValueError(f"layer {i}: base {list(s.base.shape)} and task {list(s.task.shape)}; "
                                 "expected one non-empty shape [n, rows, cols]")
            if not (s.base.is_floating_point() and s.task.is_floating_point()) or s.base.device != s.task.device:
                raise ValueError(f"layer {i}: base is {s.base.dtype} on {s.base.device}, task {s.task.dtype} on "
                                 f"{s.task.device}; expected floating point on one device")
            if outside := [k for k in s.index if not 0 <= k < len(s.base)]:
                raise ValueError(f"layer {i}: a head reads matrix {outside[0]} of {len(s.base)}")
