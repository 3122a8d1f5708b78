"""Heads that moved far, and all others that `small_changes` is not exact for: float64, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .small_changes import cosine

SERIES = 0.03  # |delta| below which x log x - x + 1 is a series, to 3e-11 relative


def exact(base: Tensor, delta: Tensor, metrics: Sequence[str], tau: float) -> dict[str, Tensor]:
    """Every metric between rows of weights and the same rows moved by `delta`, whatever they are.

    Args:
        base, delta: finite, float64 [heads, n].

    Returns:
        float64 [heads] per metric.
    """
    if not delta.any():
        return {name: torch.zeros(len(base), dtype=torch.float64, device="cpu") for name in metrics}
    moved = delta.norm(dim=1)
    # 0 / 0 is a head that stayed zero; anything else over 0 is infinitely far.
    scores = {"euclidean": moved, "relative": torch.where(moved == 0, 0.0, moved / base.norm(dim=1))}
    if "cosine_weights" in metrics:
        scores["cosine_weights"] = _one_minus_cosine(base, delta)
    if "pad_values" in metrics:
        scores |= _of_probabilities(*sorted_heads(base, delta), {"pad_values"}, tau)
    if wanted := set(metrics) - scores.keys():
        scores |= _of_probabilities(base, delta, wanted, tau)
    return {name: scores[name].cpu() for name in metrics}


def sorted_heads(base: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities sort as weights do, so the sorted weights are a pair of heads like any other."""
    lower = base.sort(1).values
    moved = (base.double() + delta.double()).sort(1).values - lower.double()
    return lower, moved


def _one_minus_cosine(a: Tensor, d: Tensor) -> Tensor:
    """1 - cos(a, a + d) per row, from the part of d across a: no difference of near-equal numbers."""
    squares, dots = a.square().sum(1), (a * d).sum(1)
    across = (d - torch.where(squares > 0, dots / squares, 0.0)[:, None] * a).square().sum(1)
    return cosine(squares, dots, across)


def _of_probabilities(base: Tensor, delta: Tensor, wanted: set[str], tau: float) -> dict[str, Tensor]:
    """log(P_T / P_B) = x - log(Z_T / Z_B), element by element."""
    logit, x = base / tau, delta / tau
    z_base = logit.logsumexp(1, keepdim=True)
    p = (logit - z_base).exp()
    log_ratio = x - ((logit + x).logsumexp(1, keepdim=True) - z_base)
    q = (logit - z_base + log_ratio).exp()
    near_base = log_ratio.abs() <= 1
    ratio = torch.where(near_base, log_ratio, 0.0).expm1()
    d = torch.where(near_base, p * ratio, q - p)
    d -= p * d.sum(1, keepdim=True)  # the rounding of Z_T / Z_B, and of a weight that holds nearly all of p
    steps = d.cumsum(1)[:, :-1].abs().sum(1)
    n = d.shape[1]
    scores = {"pad": steps / max(n - 1, 1), "pad_index": steps, "pad_values": d.abs().sum(1) / n}
    if "kl" in wanted:
        scores["kl"] = torch.where(near_base, p * _surprise(ratio), q * log_ratio - d).sum(1)
    if "js" in wanted:
        to_mean = torch.logaddexp(torch.zeros_like(log_ratio), log_ratio) - math.log(2)  # log of mean / P_B
        direct = 0.5 * (q * (log_ratio - to_mean) - p * to_mean)
        both = 0.5 * _surprise(ratio) - _surprise(0.5 * ratio)
        scores["js"] = torch.where(near_base, p * both, direct).sum(1)
    if "cosine" in wanted:
        scores["cosine"] = _one_minus_cosine(p, d)
    return {name: scores[name] for name in wanted}


def _surprise(d: Tensor) -> Tensor:
    """(1 + d) log(1 + d) - d: d^2/2 - d^3/6 + d^4/12 - ..., without cancellation for small d."""
    series = torch.full_like(d, 1 / 42)
    for k in (30, 20, 12, 6, 2):
        series = series.mul_(-d).add_(1 / k)
    direct = torch.special.xlog1py(1 + d, d) - d
    return torch.where(d.abs() < SERIES, series * d * d, direct)
