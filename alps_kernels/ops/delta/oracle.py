"""The definition of `head_delta` in plain float64 PyTorch: for readers and for tests.

It subtracts probabilities that are all close to 1 / n, so small changes cost digits. Where weights change by 1e-3,
every metric is right to 1e-7 of itself; by 1e-5, the divergences and cosines to 1e-4, the others to 1e-7 (measured).
It gives NaN for `kl` and `js` where a probability is 0, and for `relative` and `cosine_weights` of a base of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor


def head_delta(layers: Sequence[Sequence[Any]], metrics: Sequence[str], *,
               temperature: float = 1.0) -> dict[str, Tensor]:
    """The distances between heads whose elements are those of their segments, one segment after the other."""
    def elements(segments: list[Tensor]) -> Tensor:
        return torch.cat([rearrange(blocks, "head row col -> head (row col)") for blocks in segments], dim=1)

    return _scores(layers, elements, metrics, temperature)


def head_delta_projection(layers: Sequence[Sequence[Any]], metrics: Sequence[str], *,
                          temperature: float = 1.0) -> dict[str, Tensor]:
    """The distances between heads whose elements are those of W_h = q_h^T k_g v_g^T, row-major."""
    def elements(segments: list[Tensor]) -> Tensor:
        w = einsum(*segments, "head k row, head k inner, head v inner -> head row v")  # [heads, d, d_v]
        return rearrange(w, "head row v -> head (row v)")

    return _scores(layers, elements, metrics, temperature)


def _scores(layers: Sequence[Sequence[Any]], elements: Callable[[list[Tensor]], Tensor], metrics: Sequence[str],
            tau: float) -> dict[str, Tensor]:
    """Float64 [heads of all layers] per metric; a head's block in a segment is `segment.index[head]`."""
    found = []
    for layer in layers:
        base = elements([segment.base[list(segment.index)].double() for segment in layer])
        task = elements([segment.task[list(segment.index)].double() for segment in layer])
        found.append(distances(base, task, tau))
    return {name: torch.cat([each[name] for each in found]) for name in metrics}


def distances(base: Tensor, task: Tensor, tau: float) -> dict[str, Tensor]:
    """Every metric between the rows of two matrices [heads, n] (docs/how-it-works.md)."""
    n = base.shape[1]
    p, q = (base / tau).softmax(1), (task / tau).softmax(1)  # P_B and P_T
    mean = (p + q) / 2
    steps = (q - p).cumsum(1)[:, :-1].abs()  # abs(CDF_T - CDF_B) ahead of the last element
    moved = (task - base).norm(dim=1)
    return {
        "pad": steps.sum(1) / max(n - 1, 1),
        "pad_index": steps.sum(1),
        "pad_values": (q.sort(1).values - p.sort(1).values).abs().mean(1),
        "kl": _kl(q, p),
        "js": (_kl(p, mean) + _kl(q, mean)) / 2,
        "cosine": 1 - _cosine(p, q),
        "cosine_weights": 1 - _cosine(base, task),
        "euclidean": moved,
        "relative": moved / base.norm(dim=1),
    }


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
