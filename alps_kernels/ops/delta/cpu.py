"""What `head_delta` means, in plain PyTorch: the CPU backend, and the oracle of the kernels.

Most heads moved little: `reference_near` has their passes. Here is how heads are read and formed, and
the float64 definition that every other head goes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial, reduce
from itertools import accumulate, groupby, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from .small_changes import ELEMENTS, cosine, judged, near, scale
from .workers import Workers, workers

JOB = 2**19  # elements of the heads taken together
DEPTH = 512  # products summed in float32 before float64 goes on
SERIES = 0.03  # |delta| below which x log x - x + 1 is a series, to 3e-11 relative


def head_delta(layers: Sequence[Sequence[Any]], metrics: Sequence[str], *, temperature: float = 1.0,
               numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """See `ops.head_delta.head_delta`; errors call the layers by `numbers`."""
    return _scored(_Stored, layers, metrics, temperature, numbers)


def head_delta_projection(layers: Sequence[tuple[Any, Any, Any]], metrics: Sequence[str], *,
                          temperature: float = 1.0, numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """See `ops.head_delta.head_delta_projection`; errors call the layers by `numbers`."""
    return _scored(_Projected, layers, metrics, temperature, numbers)


class Heads(Protocol):
    """A layer's heads: their elements in the base, and what the task added."""

    count: int
    size: int  # elements of a head
    dtype: torch.dtype  # float32 or float64: what the differences are exact in
    ordered: torch.dtype  # what the order of the elements is exact in
    forms: Sequence[Callable[[], None]]  # to be called once before the heads are read

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers,
                  factor: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Both, the base times `factor`, [heads, width] one after the other; the caller may overwrite them.

        They are memory of this thread that its next heads take.
        """


def _scored(kind: Callable[..., Heads], layers: Sequence[Sequence[Any]], metrics: Sequence[str], tau: float,
            numbers: Sequence[int] | None) -> dict[str, Tensor]:
    """Every metric of all heads: fast where that is exact enough, the others one by one in float64."""
    if not layers:
        return {name: torch.empty(0, dtype=torch.float64) for name in metrics}
    read = [kind(layer) for layer in layers]
    named = zip(read, numbers or range(len(read)), strict=True)
    heads = [(layer, h, number) for layer, number in named for h in range(layer.count)]
    good = torch.tensor([layer.dtype == torch.float32 for layer, *_ in heads])
    scores = {name: torch.zeros(len(heads), dtype=torch.float64) for name in metrics}
    with workers(layers[0][0].base.device) as at_work:
        at_work.spread(lambda form: form(), [form for layer in read for form in layer.forms])
        jobs, fast = [job for layer in read if layer.dtype == torch.float32 for job in _jobs(layer)], good.clone()
        for wanted in filter(None, (set(metrics) - {"pad_values"}, set(metrics) & {"pad_values"})) if jobs else ():
            sums = at_work.spread(partial(_sums, wanted, tau, at_work), jobs)
            values, held = judged({name: torch.cat([each[name] for each in sums]) for name in sums[0]}, wanted, tau)
            good[fast] &= held.cpu()
            for name, value in values.items():
                scores[name][fast] = value.cpu()
        others = (~good).nonzero().flatten().tolist()
        for i, values in zip(others, at_work.spread(lambda i: _exactly(*heads[i], metrics, tau, at_work), others), strict=True):
            for name, value in values.items():
                scores[name][i] = value
    return scores


def _jobs(layer: Heads) -> list[tuple[Heads, range]]:
    """Neighbouring heads, JOB elements or one head, as evenly many as can be; the same for any number of threads."""
    count = min(layer.count, -(-layer.count * layer.size // JOB))
    return [(layer, range(a, b)) for a, b in pairwise(layer.count * i // count for i in range(count + 1))]


def _sums(wanted: Set[str], tau: float, workers: Workers, job: tuple[Heads, range]) -> dict[str, Tensor]:
    layer, heads = job
    if "pad_values" not in wanted:
        return near(layer.stretches(heads, layer.dtype, workers, scale(tau)), wanted, tau, workers)
    base, delta = _sorted(*_whole(layer.stretches(heads, layer.ordered, workers)))
    pair = base.mul_(scale(tau)).float(), delta.float()
    return near(zip(*(each.split(_width(*each.shape), 1) for each in pair), strict=True), wanted, tau, workers)


def _exactly(layer: Heads, head: int, number: int, metrics: Sequence[str], tau: float, workers: Workers) -> dict[str, Tensor]:
    base, delta = _whole(layer.stretches([head], torch.float64, workers))
    if not (base.isfinite().all() and delta.isfinite().all()):
        raise ValueError(f"head {head} of layer {number} of those given has NaN or Inf weights")
    return exact(base, delta, metrics, tau)


def _width(heads: int, size: int) -> int:
    """Of equal stretches of at most ELEMENTS."""
    return -(-size // -(-heads * size // ELEMENTS))


def _whole(stretches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Base and difference of whole heads, [heads, size]."""
    return (torch.cat(parts, 1) for parts in zip(*stretches, strict=True))


def _sorted(base: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities sort as weights do, so the sorted weights are a pair of heads like any other."""
    lower = base.sort(1).values
    moved = (base.double() + delta.double()).sort(1).values - lower.double()
    return lower, moved


class _Stored:
    """Heads whose elements are stored: their segments one after the other."""

    forms = ()

    def __init__(self, segments: Sequence[Any]) -> None:
        self.segments, self.count = segments, len(segments[0].index)
        self.size = sum(s.base[0].numel() for s in segments)
        # Differences of float32 numbers this close are exact; only float64 weights need float64.
        self.dtype = reduce(torch.promote_types, (side.dtype for s in segments for side in (s.base, s.task)), torch.float32)
        self.ordered = self.dtype

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers,
                  factor: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        weight, delta = workers.scratch("heads", 2, len(heads), self.size, dtype=dtype, device=self.segments[0].base.device)
        sides = [[_runs(side, [s.index[h] for h in heads]) for side in (s.base, s.task)] for s in self.segments]
        starts = [0, *accumulate(s.base[0].numel() for s in self.segments)]
        width = _width(len(heads), self.size)
        for at in range(0, self.size, width):
            end = min(at + width, self.size)
            for start, stop, (bases, tasks) in zip(starts, starts[1:], sides, strict=False):
                first, last = max(at, start), min(end, stop)
                row = 0
                for base, task in zip(bases, tasks, strict=True) if first < last else ():
                    rows, row = slice(row, row + len(base)), row + len(base)
                    _load(base[:, first - start:last - start], task[:, first - start:last - start],
                          weight[rows, first:last], delta[rows, first:last], factor)
            yield weight[:, at:end], delta[:, at:end]


def _load(base: Tensor, task: Tensor, weight: Tensor, delta: Tensor, factor: float) -> None:
    if base.dtype == task.dtype == weight.dtype:
        torch.sub(task, base, out=delta)
        torch.mul(base, factor, out=weight)
    else:
        delta.copy_(task).sub_(weight.copy_(base))
        weight.mul_(factor)


def _runs(blocks: Tensor, index: Sequence[int]) -> list[Tensor]:
    """The flattened blocks of `index` as views [heads, elements]: of neighbours, or of one that several heads read."""
    if list(index) == list(range(index[0], index[0] + len(index))):
        return [blocks[index[0]:index[0] + len(index)].flatten(1)]
    return [blocks[i:i + 1].flatten(1).expand(len([*same]), -1) for i, same in groupby(index)]


def _taken(blocks: Tensor, index: Sequence[int]) -> Tensor:
    runs = [run.view(-1, *blocks.shape[1:]) for run in _runs(blocks, index)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


class _Projected:
    """W_h = q^T k v^T of the base and its difference as products of differences.

    M = k v^T, dM = dk v_T^T + k_B dv^T, M_T = M_B + dM;  dW = dq^T M_T + q_B^T dM.
    """

    def __init__(self, layer: tuple[Any, Any, Any]) -> None:
        self.q, self.k, self.v = layer
        self.count, self.size = len(self.q.index), self.q.base.shape[2] * self.v.base.shape[1]
        self.dtype = reduce(torch.promote_types, (side.dtype for s in layer for side in (s.base, s.task)), torch.float32)
        self.ordered = torch.float64
        self.pairs = list(zip(self.k.index, self.v.index, strict=True))
        self.products: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def forms(self) -> Sequence[Callable[[], None]]:  # kept in self, they would keep the layer's weights until a collection
        return [partial(self._form, pair) for pair in dict.fromkeys(self.pairs)]

    def _form(self, pair: tuple[int, int]) -> None:
        self.products[pair] = self._product(*pair, self.dtype)

    def _product(self, at_k: int, at_v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """M_B, M_T and dM of a group, [d_k, d_v]: sums over d, in float64 from stretch to stretch."""
        k_base, k_task, v_base, v_task = (_folded(side.to(dtype)) for side in (
            self.k.base[at_k], self.k.task[at_k], self.v.base[at_v], self.v.task[at_v]))
        m_base = (k_base @ v_base.mT).double().sum(0)
        m_delta = ((k_task - k_base) @ v_task.mT + k_base @ (v_task - v_base).mT).double().sum(0)
        return m_base.to(dtype), (m_base + m_delta).to(dtype), m_delta.to(dtype)

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers,
                  factor: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        products = [self.products[self.pairs[h]] if dtype == self.dtype else self._product(*self.pairs[h], dtype) for h in heads]
        m_base, m_task, m_delta = map(torch.stack, zip(*products, strict=True))
        index = [self.q.index[h] for h in heads]
        q_base, q_task = (_taken(side, index).to(dtype).mT for side in (self.q.base, self.q.task))  # [heads, d, d_k]
        base, delta = workers.scratch("heads", 2, len(heads), q_base.shape[1], m_base.shape[2], dtype=dtype, device=q_base.device)
        torch.bmm(q_base, m_base * factor, out=base)
        torch.baddbmm(torch.bmm(q_base, m_delta, out=delta), q_task - q_base, m_task, out=delta)
        yield from zip(*(each.flatten(1).split(_width(len(heads), self.size), 1) for each in (base, delta)), strict=True)


def _folded(matrix: Tensor) -> Tensor:
    """[rows, d] as [d / depth, rows, depth], equal depths of at most DEPTH; zeros behind what is there."""
    rows, d = matrix.shape
    depth = -(-d // -(-d // DEPTH))
    return pad(matrix, (0, -d % depth)).view(rows, -1, depth).transpose(0, 1)


def exact(base: Tensor, delta: Tensor, metrics: Sequence[str], tau: float) -> dict[str, Tensor]:
    """Every metric between rows of weights and the same rows moved by `delta`, whatever they are.

    Args:
        base, delta: finite, float64 [heads, n].

    Returns:
        float64 [heads] per metric.
    """
    if not delta.any():
        return {name: torch.zeros(len(base), dtype=torch.float64) for name in metrics}
    scores = {}
    moved = delta.norm(dim=1)
    every = {
        "euclidean": lambda: moved,
        # 0 / 0 is a head that stayed zero; anything else over 0 is infinitely far.
        "relative": lambda: torch.where(moved == 0, 0.0, moved / base.norm(dim=1)),
        "cosine_weights": lambda: _one_minus_cosine(base, delta),
        "pad_values": lambda: _of_probabilities(*_sorted(base, delta), {"pad_values"}, tau)["pad_values"],
    }
    for name in every.keys() & set(metrics):
        scores[name] = every[name]()
    if wanted := set(metrics) - every.keys():
        scores |= _of_probabilities(base, delta, wanted, tau)
    return {name: value.cpu() for name, value in scores.items()}


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
        scores["js"] = torch.where(near_base, p * _half_surprise(ratio), direct).sum(1)
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


def _half_surprise(d: Tensor) -> Tensor:
    """The Jensen-Shannon term of P_T = (1 + d) P_B: half of surprise(d) - 2 surprise(d / 2)."""
    return 0.5 * _surprise(d) - _surprise(0.5 * d)
