"""How far every head moved between two models: checks, and the way to a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import runs_kernels
from . import cpu
from .projection import WIDEST, dtypes_of, projection_sums
from .tables import flat_sums

LAUNCHABLE = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read
METRICS = ("pad", "pad_index", "pad_values", "kl", "js", "cosine", "cosine_weights", "euclidean", "relative")
SHORT = {"pad", "pad_index", "euclidean"}  # what needs few of the sums


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


def head_delta(layers: Sequence[Sequence[Segment]], metrics: Sequence[str], *, temperature: float = 1.0,
               backend: str | None = None) -> dict[str, Tensor]:
    """Distances between the heads of two models (docs/how-it-works.md).

    A head's elements are its segments one after the other, each row-major.

    Args:
        layers: for every layer its segments, e.g. of q, k and v.
        metrics: of `METRICS`.
        temperature: tau of the softmax, positive.
        backend: "triton" to run the kernels whatever the device (in Triton's interpreter),
            "torch" never to; default: the kernels on CUDA.

    Returns:
        For every metric float64 [heads of all layers], on the CPU.

    Raises:
        ValueError: segments do not fit together, or a weight is NaN or Inf: it names the head.
    """
    _check(layers, metrics, temperature)
    return _dispatch(layers, metrics, temperature, backend, projection=False)


def head_delta_projection(layers: Sequence[tuple[Segment, Segment, Segment]], metrics: Sequence[str], *,
                          temperature: float = 1.0, backend: str | None = None) -> dict[str, Tensor]:
    """Distances between the heads' W_h = q_h^T k_g v_g^T, [d, d_v] (paper, eq. 5).

    Args:
        layers: for every layer (q [H, d_k, d], k [G, d_k, d_in], v [G, d_v, d_in]).

    Returns and Raises: as `head_delta`.
    """
    _check(layers, metrics, temperature)
    for i, (q, k, v) in enumerate(layers):
        if q.base.shape[1] != k.base.shape[1] or k.base.shape[2] != v.base.shape[2]:
            raise ValueError(f"layer {i}: q {list(q.base.shape)}, k {list(k.base.shape)} and v {list(v.base.shape)} "
                             "do not multiply to q^T k v^T")
    return _dispatch(layers, metrics, temperature, backend, projection=True)


def _dispatch(layers: Sequence, metrics: Sequence[str], tau: float, backend: str | None,
              projection: bool) -> dict[str, Tensor]:
    """What the kernels do by them, layers of one kind together; the others, and doubtful heads, by the CPU backend."""
    plain = cpu.head_delta_projection if projection else cpu.head_delta
    summed = [name for name in metrics if name != "pad_values"]  # a sort, which torch does well
    batches: dict[tuple | torch.device, list[int]] = {}
    for i, layer in enumerate(layers):
        kernel = summed and (runs_kernels(layer[0].base) if backend is None else backend == "triton")
        kernel = kernel and all(side.dtype in LAUNCHABLE for s in layer for side in (s.base, s.task))
        kernel = kernel and not (projection and layer[2].base.shape[1] > WIDEST)
        batches.setdefault(_kind(layer, projection) if kernel else layer[0].base.device, []).append(i)
    widths = [len(layer[0].index) for layer in layers]
    found = {name: [torch.empty(0, dtype=torch.float64, device="cpu")] * max(1, len(layers)) for name in metrics}
    for kind, numbers in batches.items():
        some = [layers[i] for i in numbers]
        if isinstance(kind, torch.device):
            values = plain(some, metrics, temperature=tau, numbers=numbers)
        else:
            sums = (projection_sums if projection else flat_sums)(some, tau, bool(set(summed) - SHORT))
            values = sums.scores(summed)
            if "pad_values" in metrics:
                values |= plain(some, ["pad_values"], temperature=tau, numbers=numbers)
            heads = [(layer, head, i) for layer, i in zip(some, numbers, strict=True) for head in range(widths[i])]
            for at in sums.doubtful(summed).nonzero().flatten().tolist():
                for name, value in _of_one(plain, *heads[at], summed, tau).items():
                    values[name][at] = value
        for name, column in values.items():
            for i, part in zip(numbers, column.split([widths[i] for i in numbers]), strict=True):
                found[name][i] = part
    return {name: torch.cat(parts) for name, parts in found.items()}


def _of_one(plain: Callable[..., dict[str, Tensor]], layer: Sequence[Segment], head: int, number: int,
            metrics: Sequence[str], tau: float) -> dict[str, Tensor]:
    """One head by the CPU backend, in float64."""
    exact = [Segment(*(side[s.index[head]][None].double() for side in (s.base, s.task)), (0,)) for s in layer]
    if not all(side.isfinite().all() for s in exact for side in (s.base, s.task)):
        raise ValueError(f"head {head} of layer {number} of those given has NaN or Inf weights")
    return {name: value[0] for name, value in plain([exact], metrics, temperature=tau).items()}


def _kind(layer: Sequence[Segment], projection: bool) -> tuple:
    """What layers of one launch have in common."""
    if not projection:
        return (layer[0].base.device,)
    q, _, v = layer
    return (q.base.device, q.base.shape[1:], v.base.shape[1:], *dtypes_of(layer))


def _check(layers: Sequence[Sequence[Segment]], metrics: Sequence[str], temperature: float) -> None:
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metric is {unknown[0]!r}; expected one of {METRICS}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; expected a positive number")
    for i, segments in enumerate(layers):
        if not segments or len({len(s.index) for s in segments}) != 1 or not segments[0].index:
            raise ValueError(f"layer {i}: its segments are not of the same one or more heads")
        devices = sorted({str(side.device) for s in segments for side in (s.base, s.task)})
        if len(devices) > 1:
            raise ValueError(f"layer {i}: its weights are on {' and '.join(devices)}; expected one device (give"
                             " score_heads a device=)")
        for s in segments:
            if s.base.ndim != 3 or s.base.shape != s.task.shape or s.base.numel() == 0:
                raise ValueError(f"layer {i}: base {list(s.base.shape)} and task {list(s.task.shape)}; "
                                 "expected one non-empty shape [n, rows, cols]")
            if not (s.base.is_floating_point() and s.task.is_floating_point()):
                raise ValueError(f"layer {i}: base is {s.base.dtype}, task {s.task.dtype}; expected floating point")
            n = len(s.base)
            if outside := [k for k in s.index if not 0 <= k < n]:
                raise ValueError(f"layer {i}: a head reads matrix {outside[0]} of {n}")
