"""The CPU backend of `head_delta`: how heads are read, formed and spread over threads.

Most heads moved little: `small_changes` has their passes. All others go to `large_changes`, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial, reduce
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from .large_changes import exact, sorted_heads
from .small_changes import ELEMENTS, metrics_of, scale, sums_of
from .workers import Workers, workers

JOB = 2**19  # elements of the heads taken together
DEPTH = 512  # products summed in float32 before float64 goes on
Pairs = Iterator[tuple[Tensor, Tensor]]  # base and difference of stretches of some heads, [heads, width]


def head_delta(layers: Sequence[Sequence[Any]], metrics: Sequence[str], *, temperature: float = 1.0,
               numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """See `op.head_delta`; errors call the layers by `numbers`."""
    return _scored(_Stored, layers, metrics, temperature, numbers)


def head_delta_projection(layers: Sequence[tuple[Any, Any, Any]], metrics: Sequence[str], *,
                          temperature: float = 1.0, numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """See `op.head_delta_projection`; errors call the layers by `numbers`."""
    return _scored(_Projected, layers, metrics, temperature, numbers)


def _scored(kind: Callable[..., _Heads], layers: Sequence[Sequence[Any]], metrics: Sequence[str], tau: float,
            numbers: Sequence[int] | None) -> dict[str, Tensor]:
    """Every metric of all heads: fast where that is exact enough, the others one by one in float64."""
    if not layers:
        return {name: torch.empty(0, dtype=torch.float64, device="cpu") for name in metrics}
    read = [kind(layer) for layer in layers]
    named = zip(read, numbers or range(len(read)), strict=True)
    heads = [(layer, h, number) for layer, number in named for h in range(layer.count)]
    good = torch.tensor([layer.dtype == torch.float32 for layer, *_ in heads], device="cpu")
    scores = {name: torch.zeros(len(heads), dtype=torch.float64, device="cpu") for name in metrics}
    with workers(layers[0][0].base.device) as at_work:
        at_work.spread(lambda form: form(), [form for layer in read for form in layer.forms])
        jobs, fast = [job for layer in read if layer.dtype == torch.float32 for job in _jobs(layer)], good.clone()
        for wanted in filter(None, (set(metrics) - {"pad_values"}, set(metrics) & {"pad_values"})) if jobs else ():
            sums = at_work.spread(partial(_sums, wanted, tau, at_work), jobs)
            sums = {name: torch.cat([each[name] for each in sums]) for name in sums[0]}
            values, held = metrics_of(sums, wanted, tau)
            good[fast] &= held.cpu()
            for name, value in values.items():
                scores[name][fast] = value.cpu()
        others = (~good).nonzero().flatten().tolist()
        exactly = at_work.spread(lambda i: _exactly(*heads[i], metrics, tau, at_work), others)
        for i, values in zip(others, exactly, strict=True):
            for name, value in values.items():
                scores[name][i] = value
    return scores


def _jobs(layer: _Heads) -> list[tuple[_Heads, range]]:
    """Neighbouring heads, JOB elements or one head, as evenly many as can be; the same for any number of threads."""
    count = min(layer.count, -(-layer.count * layer.size // JOB))
    return [(layer, range(a, b)) for a, b in pairwise(layer.count * i // count for i in range(count + 1))]


def _sums(wanted: Set[str], tau: float, workers: Workers, job: tuple[_Heads, range]) -> dict[str, Tensor]:
    layer, heads = job
    if "pad_values" not in wanted:
        return sums_of(layer.stretches(heads, layer.dtype, workers, scale(tau)), wanted, tau, workers)
    base, delta = sorted_heads(*_whole(layer.stretches(heads, layer.ordered, workers)))
    pair = base.mul_(scale(tau)).float(), delta.float()
    return sums_of(zip(*map(_split, pair), strict=True), wanted, tau, workers)


def _exactly(layer: _Heads, head: int, number: int, metrics: Sequence[str], tau: float,
             workers: Workers) -> dict[str, Tensor]:
    base, delta = _whole(layer.stretches([head], torch.float64, workers))
    if not (base.isfinite().all() and delta.isfinite().all()):
        raise ValueError(f"head {head} of layer {number} of those given has NaN or Inf weights")
    return exact(base, delta, metrics, tau)


def _width(heads: int, size: int) -> int:
    """Of equal stretches of at most ELEMENTS."""
    return -(-size // -(-heads * size // ELEMENTS))


def _split(heads: Tensor) -> Sequence[Tensor]:
    return heads.split(_width(*heads.shape), 1)


def _whole(stretches: Pairs) -> Iterator[Tensor]:
    """Base and difference of whole heads, [heads, size]."""
    return (torch.cat(parts, 1) for parts in zip(*stretches, strict=True))


class _Heads:
    """A layer's heads: their elements in the base, and what the task added.

    Attributes:
        count, size: heads, and elements of each.
        dtype: float32 or float64: what the differences are exact in.
        ordered: what the order of the elements is exact in.
        forms: to be called once before the heads are read.
    """

    forms: Sequence[Callable[[], None]] = ()

    def __init__(self, segments: Sequence[Any], size: int) -> None:
        self.segments, self.count, self.size = segments, len(segments[0].index), size
        # Differences of float32 numbers this close are exact; only float64 weights need float64.
        dtypes = (side.dtype for s in segments for side in (s.base, s.task))
        self.dtype = self.ordered = reduce(torch.promote_types, dtypes, torch.float32)

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers, factor: float = 1.0) -> Pairs:
        """Both, the base times `factor`, [heads, width] one after the other; the caller may overwrite them.

        They are memory of this thread that its next heads take.
        """
        raise NotImplementedError


class _Stored(_Heads):
    """Heads whose elements are stored: their segments one after the other."""

    def __init__(self, segments: Sequence[Any]) -> None:
        super().__init__(segments, sum(s.base[0].numel() for s in segments))

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers, factor: float = 1.0) -> Pairs:
        device = self.segments[0].base.device
        weight, delta = workers.scratch("heads", 2, len(heads), self.size, dtype=dtype, device=device)
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
        return [rearrange(blocks[index[0]:index[0] + len(index)], "head row col -> head (row col)")]
    return [rearrange(blocks[i:i + 1], "head row col -> head (row col)").expand(len([*same]), -1)
            for i, same in groupby(index)]


class _Projected(_Heads):
    """W_h = q^T k v^T of the base and its difference as products of differences.

    M = k v^T, dM = dk v_T^T + k_B dv^T, M_T = M_B + dM;  dW = dq^T M_T + q_B^T dM.
    """

    def __init__(self, layer: tuple[Any, Any, Any]) -> None:
        self.q, self.k, self.v = layer
        super().__init__(layer, self.q.base.shape[2] * self.v.base.shape[1])
        self.ordered = torch.float64
        self.pairs = list(zip(self.k.index, self.v.index, strict=True))
        self.products: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def forms(self) -> Sequence[Callable[[], None]]:
        # A property: kept in self, they would keep the layer's weights until a collection.
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

    def stretches(self, heads: Sequence[int], dtype: torch.dtype, workers: Workers, factor: float = 1.0) -> Pairs:
        products = [self.products[self.pairs[h]] if dtype == self.dtype else self._product(*self.pairs[h], dtype)
                    for h in heads]
        m_base, m_task, m_delta = map(torch.stack, zip(*products, strict=True))
        index = [self.q.index[h] for h in heads]
        q_base, q_task = (_taken(side, index).to(dtype).mT for side in (self.q.base, self.q.task))  # [heads, d, d_k]
        shape = len(heads), q_base.shape[1], m_base.shape[2]
        base, delta = workers.scratch("heads", 2, *shape, dtype=dtype, device=q_base.device)
        torch.bmm(q_base, m_base * factor, out=base)
        torch.baddbmm(torch.bmm(q_base, m_delta, out=delta), q_task - q_base, m_task, out=delta)
        yield from zip(*(_split(rearrange(each, "head d v -> head (d v)")) for each in (base, delta)), strict=True)


def _taken(blocks: Tensor, index: Sequence[int]) -> Tensor:
    runs = [rearrange(run, "head (row col) -> head row col", col=blocks.shape[2]) for run in _runs(blocks, index)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _folded(matrix: Tensor) -> Tensor:
    """[rows, d] as [d / depth, rows, depth], equal depths of at most DEPTH; zeros behind what is there."""
    d = matrix.shape[1]
    depth = -(-d // -(-d // DEPTH))
    return rearrange(pad(matrix, (0, -d % depth)), "row (fold col) -> fold row col", col=depth)
