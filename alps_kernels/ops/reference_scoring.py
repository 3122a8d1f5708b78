"""What `head_delta` means, in plain PyTorch: the CPU backend, and the oracle of the kernels.

The probabilities of a head's n elements are all close to 1/n and a score is the sum of their
tiny differences, so they are never subtracted (DESIGN, Numerics). With x = (t - b) / tau,
e = exp((b - max b) / tau) and u = expm1(x):

    r = sum(e u) / sum(e),  Z_T = Z_B (1 + r),  P_T - P_B = e (u - r) / Z_T
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 2**17  # elements at work at once: their float64 temporaries stay in a core's cache
LARGE = 1.0  # |x| beyond which a weight that dominates leaves a small Z_T to float32 rounding: then float64
SERIES = 0.03  # |delta| below which x log x - x + 1 is a series, to 3e-11 relative
PADS = ("pad", "pad_index")


def head_delta(layers: Sequence[Sequence[Any]], metrics: Sequence[str], *, temperature: float = 1.0,
               first: int = 0) -> dict[str, Tensor]:
    """See `ops.head_delta.head_delta`; errors count layers from `first`."""
    return _scored((_rows(layer) for layer in layers), metrics, temperature, first)


def head_delta_projection(layers: Sequence[tuple[Any, Any, Any]], metrics: Sequence[str], *,
                          temperature: float = 1.0, first: int = 0) -> dict[str, Tensor]:
    """See `ops.head_delta.head_delta_projection`; errors count layers from `first`."""
    return _scored((_projected(*layer) for layer in layers), metrics, temperature, first)


def _scored(layers: Iterator[Iterator[tuple[Tensor, Tensor]]], metrics: Sequence[str], tau: float,
            first: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for index, layer in enumerate(layers, first):
        seen = 0
        for base, delta in layer:
            largest = torch.maximum(-delta.amin(1), delta.amax(1))  # vectorised, which aminmax is not
            # Where both sides are infinite alike the difference is NaN, so two checks see everything.
            if not (sound := base.amax(1).isfinite() & largest.isfinite()).all():
                head = seen + int((~sound).nonzero()[0])
                raise ValueError(f"head {head} of layer {index} of those given has NaN or Inf weights")
            seen += len(base)
            for name, value in _score_rows(base, delta, metrics, tau, largest / tau).items():
                found[name].append(value)
    return {name: torch.cat(values).cpu() if values else torch.empty(0, dtype=torch.float64) for name, values in found.items()}


def _rows(segments: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer's heads some at a time: their elements in the base and what the task added, [heads, n].

    The two tensors are overwritten by the next ones.
    """
    heads = len(segments[0].index)
    sizes = [s.base[0].numel() for s in segments]
    step = min(heads, max(1, ELEMENTS // sum(sizes)))
    # Differences of float32 numbers this close are exact; only float64 weights need float64.
    dtype = reduce(torch.promote_types, (side.dtype for s in segments for side in (s.base, s.task)), torch.float32)
    base, task = torch.empty(2, step, sum(sizes), dtype=dtype, device=segments[0].base.device)
    for at in range(0, heads, step):
        rows = min(step, heads - at)
        for side, out in (("base", base), ("task", task)):
            for segment, column in zip(segments, out[:rows].split(sizes, 1), strict=True):
                blocks = _take(getattr(segment, side), segment.index[at:at + step])
                column.unflatten(1, blocks.shape[1:]).copy_(blocks)
        yield base[:rows], task[:rows].sub_(base[:rows])


def _take(blocks: Tensor, index: Sequence[int]) -> Tensor:
    first, last = index[0], index[-1]
    if tuple(index) == tuple(range(first, last + 1)):
        return blocks[first:last + 1]
    return blocks[list(index)]


def _projected(q: Any, k: Any, v: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """W_h = q^T k v^T of the base and its difference as products of differences, float64.

    M = k v^T, dM = dk v_T^T + k_B dv^T;  dW = dq^T M_T + q_B^T dM.
    """
    step = max(1, ELEMENTS // (q.base.shape[2] * v.base.shape[1]))
    for (at_k, at_v), heads in groupby(range(len(q.index)), key=lambda h: (k.index[h], v.index[h])):
        k_base, k_task, v_base, v_task = (side.double() for side in (k.base[at_k], k.task[at_k], v.base[at_v], v.task[at_v]))
        m_base, m_task = k_base @ v_base.mT, k_task @ v_task.mT  # [d_k, d_v]
        m_delta = (k_task - k_base) @ v_task.mT + k_base @ (v_task - v_base).mT
        heads = list(heads)
        for at in range(0, len(heads), step):
            index = [q.index[h] for h in heads[at:at + step]]
            q_base, q_task = (_take(side, index).double().mT for side in (q.base, q.task))  # [heads, d, d_k]
            delta = (q_task - q_base) @ m_task + q_base @ m_delta
            yield (q_base @ m_base).flatten(1), delta.flatten(1)  # [heads, d * d_v]


def _score_rows(base: Tensor, delta: Tensor, metrics: Sequence[str], tau: float, largest: Tensor) -> dict[str, Tensor]:
    """Every metric between rows of weights and the same rows moved by `delta`.

    Args:
        base, delta: finite, [heads, n], float32 or float64; both are overwritten.
        tau: temperature of the softmax.
        largest: max abs(delta) / tau of every row, [heads].

    Returns:
        float64 [heads] per metric.
    """
    scores: dict[str, Tensor] = {}
    if wanted := set(metrics) & {"euclidean", "relative", "cosine_weights"}:
        scores |= _of_weights(base.double(), delta.double(), wanted)
    if "pad_values" in metrics:
        # Probabilities sort as weights do, so the sorted weights are a pair of heads like any other.
        lower = base.sort(1).values
        moved = (base.double() + delta.double()).sort(1).values - lower.double()
        scores |= _of_probabilities(lower, moved.to(base.dtype), {"pad_values"}, tau, largest)
    if wanted := set(metrics) - {"euclidean", "relative", "cosine_weights", "pad_values"}:
        scores |= _of_probabilities(base, delta, wanted, tau, largest)
    return {name: scores[name] for name in metrics}


def _of_weights(base: Tensor, delta: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    scores = {}
    moved = delta.norm(dim=1)
    if "euclidean" in wanted:
        scores["euclidean"] = moved
    if "relative" in wanted:
        # 0 / 0 is a head that stayed zero; anything else over 0 is infinitely far.
        scores["relative"] = torch.where(moved == 0, 0.0, moved / base.norm(dim=1))
    if "cosine_weights" in wanted:
        scores["cosine_weights"] = _one_minus_cosine(base, delta)
    return scores


def _one_minus_cosine(a: Tensor, d: Tensor) -> Tensor:
    """1 - cos(a, a + d) per row, from the part of d across a: no difference of near-equal numbers."""
    squares, dots = a.square().sum(1), (a * d).sum(1)
    across = (d - torch.where(squares > 0, dots / squares, 0.0)[:, None] * a).square().sum(1)
    return _cosine(squares, dots, across)


def cosine_distance(squares: Tensor, dots: Tensor, moved: Tensor) -> Tensor:
    """1 - cos(a, a + d) from the sums of a^2, a d and d^2, float64."""
    return _cosine(squares, dots, (moved - torch.where(squares > 0, dots.square() / squares, 0.0)).clamp(min=0))


def _cosine(squares: Tensor, dots: Tensor, across: Tensor) -> Tensor:
    """`across`: the squared length of d's part across a. A zero vector is at 0 from itself, at 1 from any other."""
    norm = squares.sqrt()
    alpha = norm + dots / norm  # length of a + d along a
    length = (alpha.square() + across).sqrt()
    exact = torch.where(alpha > 0, across / (length * (length + alpha)), 1 - alpha / length)
    degenerate = torch.where((squares == 0) & (across == 0), 0.0, 1.0)
    return torch.where((squares == 0) | (length == 0), degenerate, exact)


def _of_probabilities(base: Tensor, delta: Tensor, wanted: set[str], tau: float, largest: Tensor) -> dict[str, Tensor]:
    far = largest > LARGE
    if not far.any():
        return _from_near(base, delta, wanted, tau)
    scores = {name: torch.zeros_like(largest, dtype=torch.float64) for name in wanted}
    for rows, compute in ((far, _from_far), (~far, _from_near)):
        if rows.any():
            for name, value in compute(base[rows], delta[rows], wanted, tau).items():
                scores[name][rows] = value
    return scores


def _from_near(base: Tensor, delta: Tensor, wanted: set[str], tau: float) -> dict[str, Tensor]:
    """exp and expm1 in the weights' precision, whose rounding errors are independent; sums in float64.

    `base` and `delta` are overwritten by e and u.
    """
    base.sub_(base.amax(1, keepdim=True))
    if tau != 1:
        base.div_(tau)
        delta.div_(tau)
    e, u, n = base.exp_(), delta.expm1_(), base.shape[1]
    starts = range(0, n, ELEMENTS)
    work = torch.empty(2, len(e), min(n, ELEMENTS), dtype=torch.float64, device=e.device)

    def load(at: int) -> tuple[Tensor, Tensor]:
        """e and e u of the columns from `at`, float64, in `work`."""
        stop = min(at + ELEMENTS, n)
        weight, moved = work[:, :, :stop - at]
        weight.copy_(e[:, at:stop])
        return weight, moved.copy_(u[:, at:stop]).mul_(weight)

    z_base, shift, carry = torch.zeros(3, len(e), 1, dtype=torch.float64, device=e.device)
    for at in starts:
        weight, moved = load(at)
        z_base += weight.sum(1, keepdim=True)
        shift += moved.sum(1, keepdim=True)
    r, z_task = shift / z_base, z_base + shift
    sums = {name: torch.zeros_like(z_base) for name in wanted}
    for at in starts:
        if len(starts) > 1:
            weight, moved = load(at)
        d = moved.addcmul_(weight, r, value=-1)  # (P_T - P_B) Z_T
        _add_pointwise(sums, weight, d, r)
        if wanted & set(PADS):
            d[:, :1] += carry
            carry = d.cumsum_(1)[:, -1:].clone()
            total = d.abs_().sum(1, keepdim=True)
            if at == starts[-1]:
                total -= d[:, -1:]  # the last CDF is 1 on both sides
            for name in wanted & set(PADS):
                sums[name] += total
    scale = {"pad": z_task * max(n - 1, 1), "pad_index": z_task, "pad_values": z_task * n, "kl": z_base, "js": z_base}
    scores = {name: (sums[name] / scale[name]).squeeze(1) for name in wanted - {"cosine"}}
    if "cosine" in wanted:
        e = e.double()
        scores["cosine"] = _one_minus_cosine(e / z_base, u.double().sub_(r).mul_(e) / z_task)
    return scores


def _add_pointwise(sums: dict[str, Tensor], weight: Tensor, d: Tensor, r: Tensor) -> None:
    """Add to `sums` what needs no order: sums over elements of abs(d) and of P_B times a divergence."""
    if "pad_values" in sums:
        sums["pad_values"] += d.abs().sum(1, keepdim=True)
    if sums.keys() & {"kl", "js"}:
        ratio = d.div(weight).div_(1 + r).nan_to_num_(0.0)  # P_T / P_B - 1; an underflown weight counts nothing
        for name, term in (("kl", _surprise), ("js", _half_surprise)):
            if name in sums:
                sums[name] += (weight * term(ratio)).sum(1, keepdim=True)


def _surprise(d: Tensor) -> Tensor:
    """(1 + d) log(1 + d) - d: d^2/2 - d^3/6 + d^4/12 - ..., without cancellation for small d."""
    series = torch.full_like(d, 1 / 42)
    for k in (30, 20, 12, 6, 2):
        series = series.mul_(-d).add_(1 / k)
    direct = torch.special.xlog1py(1 + d, d) - d
    return torch.where(d.abs() < SERIES, series * d * d, direct)


def _half_surprise(d: Tensor) -> Tensor:
    """The Jensen-Shannon term of P_T = (1 + d) P_B: half of surprise(d) - 2 surprise(d / 2)."""
    return 0.5 * _surprise(d) - _surprise(0.5 * d)


def _from_far(base: Tensor, delta: Tensor, wanted: set[str], tau: float) -> dict[str, Tensor]:
    """Heads with a weight far from its base, in float64: log(P_T / P_B) = x - log(Z_T / Z_B), element by element."""
    logit, x = base.double() / tau, delta.double() / tau
    z_base, z_task = logit.logsumexp(1, keepdim=True), (logit + x).logsumexp(1, keepdim=True)
    log_ratio = x - (z_task - z_base)
    p, q = (logit - z_base).exp(), (logit + x - z_task).exp()
    near = log_ratio.abs() <= 1
    ratio = torch.where(near, log_ratio, 0.0).expm1()
    d = torch.where(near, p * ratio, q - p)
    steps = d.cumsum(1)[:, :-1].abs().sum(1)
    n = d.shape[1]
    scores = {"pad": steps / max(n - 1, 1), "pad_index": steps, "pad_values": d.abs().sum(1) / n}
    if "kl" in wanted:
        scores["kl"] = torch.where(near, p * _surprise(ratio), q * log_ratio - d).sum(1)
    if "js" in wanted:
        to_mean = torch.logaddexp(torch.zeros_like(log_ratio), log_ratio) - math.log(2)  # log of mean / P_B
        direct = 0.5 * (q * (log_ratio - to_mean) - p * to_mean)
        scores["js"] = torch.where(near, p * _half_surprise(ratio), direct).sum(1)
    if "cosine" in wanted:
        scores["cosine"] = _one_minus_cosine(p, d)
    return {name: scores[name] for name in wanted}
