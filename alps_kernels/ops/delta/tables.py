"""The launches of the scoring kernels: work lists, carries between tiles, and what the sums mean."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device import device_code, on_device, triton_type
from .small_changes import CANCELLED, CONCENTRATED, cosine_distance

BLOCK = 2048  # elements of a tile: 64 for each thread of a warp
LANES = 64 if torch.version.hip else 32  # threads of a warp
ROWS, K_BLOCK = 16, 32  # of a projection's tile; with d_v = 128 a tile is 2,048 elements
STATS, SCANS = 8, 8  # columns of the kernels' tables
# Pass A takes exp(logit) without a shift. A head whose largest is beyond this, or below its inverse, is doubtful: logits
# so far from 0 have float32 digits too few, and the sums of the latter may underflow.
RANGE = 2.0**32
LARGE = 1.0  # |x| beyond which a weight that dominates leaves a small Z_T to float32 rounding: then float64
LAUNCHABLE = (torch.float32, torch.float16, torch.bfloat16)


class TileKind(NamedTuple):
    """One kind of tile of the work list."""

    base: torch.dtype
    task: torch.dtype
    flat: bool
    full: bool  # flat, and BLOCK elements each


def flat_sums(layers: Sequence[Sequence[Any]], tau: float, norms: bool, extra: bool) -> Sums:
    """Both passes over heads whose elements are stored (every representation but `projection`).

    A pass is one launch over the whole model for each kind of tile. Launching group by group, so that
    pass B finds its weights in L2, does not pay by prediction: the q/k/v of a bf16 pair of Llama-3.1-8B
    are 3.2 GB, 161 groups of 20 MB (under half of an H100's 50 MB), and each group needs a launch of
    pass A, of the sums between and of pass B, at 3 us apiece 1.4 ms, to save a second read of 1.07 ms at
    3.0 TB/s. Instead pass B goes through the tiles backwards: what pass A read last is still there.
    """
    device = layers[0][0].base.device
    slots = max(sum(-(-s.base[0].numel() // BLOCK) for s in layer) for layer in layers)
    tiles, segments, sizes = _work_list(layers, slots)
    tiles = {key: table.to(device) for key, table in tiles.items()}
    segments = segments.to(device)
    kernels = device_code("head_delta")
    sums = Sums(len(sizes), slots, torch.tensor(sizes, dtype=torch.float64, device=device))
    common = {"BLOCK": BLOCK, "LANES": LANES, "num_warps": 1, "enable_fp_fusion": True}
    with on_device(device):
        for key, table in tiles.items():
            kernels.head_delta_stats_kernel[(len(table),)](
                table, segments, sums.stats, 1 / tau, BASE=triton_type(key.base), TASK=triton_type(key.task),
                FLAT=key.flat, FULL=key.full, NORMS=norms, **common)
        starts = sums.between()
        for key, table in tiles.items():
            kernels.head_delta_scan_kernel[(len(table),)](
                table, segments, starts, sums.scans, 1 / tau, BASE=triton_type(key.base),
                TASK=triton_type(key.task), FLAT=key.flat, FULL=key.full, EXTRA=extra, **common)
    return sums


def projection_sums(layers: Sequence[tuple[Any, Any, Any]], tau: float, norms: bool, extra: bool) -> Sums:
    """Both passes over W_h = q_h^T k_g v_g^T of layers of one shape, strides and dtypes."""
    q, _, v = layers[0]
    device, (d_k, d_model), d_v = q.base.device, q.base.shape[1:], v.base.shape[1]
    slots = -(-d_model // ROWS)
    rows, products = [], ([], [], [])
    for q, k, v in layers:
        pairs = {pair: i for i, pair in enumerate(dict.fromkeys(zip(k.index, v.index, strict=True)))}
        first = sum(map(len, products[0]))
        for out, product in zip(products, _group_products(k, v, list(pairs)), strict=True):
            out.append(product)
        rows += [(address(q.base, i), address(q.task, i), first + pairs[pair])
                 for i, pair in zip(q.index, zip(k.index, v.index, strict=True), strict=True)]
    where = torch.tensor(rows, dtype=torch.int64).to(device)
    m_base, m_task, m_delta = (torch.cat(product).float() for product in products)
    kernels = device_code("head_projection")
    sums = Sums(len(rows), slots, torch.full((len(rows),), float(d_model * d_v), dtype=torch.float64, device=device))
    common = {
        "BASE": triton_type(q.base.dtype), "TASK": triton_type(q.task.dtype), "D_K": d_k, "D_V": d_v,
        "V_PAD": max(16, 1 << (d_v - 1).bit_length()), "ROWS": ROWS, "K_BLOCK": K_BLOCK,
        # Three passes of the tensor cores come to float32's precision; AMD's have float32 of their own.
        "PRECISION": "ieee" if torch.version.hip else "tf32x3", "num_warps": 4, "enable_fp_fusion": True,
    }
    strides = (d_model, q.base.stride(1), q.task.stride(1), 1 / tau)
    with on_device(device):
        kernels.projection_stats_kernel[(len(rows), slots)](
            where, m_base, m_task, m_delta, sums.stats, *strides, NORMS=norms, **common)
        kernels.projection_scan_kernel[(len(rows), slots)](
            where, m_base, m_task, m_delta, sums.between(), sums.scans, *strides, EXTRA=extra, **common)
    return sums


def _group_products(k: Any, v: Any, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """M_B, M_T and dM = dk v_T^T + k_B dv^T of every group, float64 [groups, d_k, d_v]."""
    k_base, k_task = (side[[p[0] for p in pairs]].double() for side in (k.base, k.task))
    v_base, v_task = (side[[p[1] for p in pairs]].double() for side in (v.base, v.task))
    return (k_base @ v_base.mT, k_task @ v_task.mT,
            (k_task - k_base) @ v_task.mT + k_base @ (v_task - v_base).mT)


def address(blocks: Tensor, i: int) -> int:
    return blocks.data_ptr() + i * blocks.stride(0) * blocks.element_size()


def _work_list(layers: Sequence[Sequence[Any]], slots: int) -> tuple[dict[TileKind, Tensor], Tensor, list[int]]:
    """Tiles by launch (int64 [n, 5]), segments (int64 [n, 8]), sizes of heads.

    A tile: its addresses in both models if flat, else its segment and its first element there; slot,
    count, whether it is the head's last. A segment is one matrix of one head: addresses in both models,
    cols, row and column strides.
    """
    tiles, segments, sizes = defaultdict(list), [], []
    n_segments = 0
    for layer in layers:
        heads = torch.arange(len(layer[0].index))
        first_slot = (len(sizes) + heads) * slots
        for position, s in enumerate(layer):
            size, cols = s.base[0].numel(), s.base.shape[2]
            index = torch.tensor(s.index)
            where = [side.data_ptr() + index * (side.stride(0) * side.element_size()) for side in (s.base, s.task)]
            fixed = torch.tensor([cols, *s.base.stride()[1:], *s.task.stride()[1:], 0]).expand(len(heads), -1)
            segments.append(torch.cat([torch.stack(where, 1), fixed], 1))
            start = torch.arange(0, size, BLOCK)
            count = (size - start).clamp(max=BLOCK)
            last = torch.zeros_like(start)
            last[-1] = position == len(layer) - 1
            flat = all(side[0].is_contiguous() and bool((w % 16 == 0).all())
                       for side, w in zip((s.base, s.task), where, strict=True)) and size % 16 == 0
            at = ([w[:, None] + start * side.element_size() for side, w in zip((s.base, s.task), where, strict=True)]
                  if flat else [(n_segments + heads)[:, None], start])
            grid = torch.stack(torch.broadcast_tensors(*at, first_slot[:, None] + torch.arange(len(start)), count, last), -1)
            full = (count == BLOCK) & flat
            for which in (full, ~full):
                if which.any():
                    tiles[TileKind(s.base.dtype, s.task.dtype, flat, which is full)].append(grid[:, which].flatten(0, 1))
            n_segments += len(heads)
            first_slot = first_slot + len(start)
        sizes += [sum(s.base[0].numel() for s in layer)] * len(heads)
    return {key: torch.cat(grids) for key, grids in tiles.items()}, torch.cat(segments), sizes


class Sums:
    """What both passes leave behind, and what it comes to in float64.

    Attributes:
        stats, scans: float32 [heads * slots, 8], a row a tile; see the kernels for the columns.
    """

    def __init__(self, heads: int, slots: int, sizes: Tensor) -> None:
        self.sizes, self.shape = sizes, (heads, slots)
        self.stats = torch.zeros(heads * slots, STATS, device=sizes.device)
        self.scans = torch.zeros(heads * slots, SCANS, device=sizes.device)

    def between(self) -> Tensor:
        """What each tile of pass B starts from, float32 [heads * slots, 5].

        The CDF difference before it, times Z_T; then, of its head, the shift with which e is 1 in the
        mean, r and 1 / (1 + r); and a bound of abs(x) + abs(r) in it.
        """
        stats = self.stats.view(*self.shape, STATS).double()
        weight, moved, far = stats[:, :, 0], stats[:, :, 1], stats[:, :, 6]
        z_base = weight.sum(1, keepdim=True)
        self.top = stats[:, :, 5].amax(1)
        self.few = z_base.squeeze(1) / self.top
        r = moved.sum(1, keepdim=True) / z_base
        shift = (z_base / self.sizes[:, None]).log2().float()
        unit = shift.double().neg().exp2()
        self.z_base = (unit * z_base).squeeze(1)
        self.z_task = self.z_base * (1 + r.squeeze(1))
        change = unit * (moved - r * weight)
        carry = change.cumsum(1) - change
        self.squares = stats[:, :, 2:5].sum(1)
        self.largest = far.amax(1)
        starts = torch.broadcast_tensors(carry, shift, r, 1 / (1 + r), far + r.abs())
        return torch.stack(starts, -1).float().flatten(0, 1)

    @property
    def sound(self) -> Tensor:
        """Which heads have finite weights."""
        return self.squares[:, 0].isfinite()

    def doubtful(self, metrics: Sequence[str]) -> Tensor:
        """Which heads the float32 sums may miss, bool [heads]: they are rare, and the reference takes them."""
        dd, bb, bd = self.squares.unbind(1)
        aa, ac, cc = self.scans.view(*self.shape, SCANS)[:, :, 3:6].double().sum(1).unbind(1)
        held = (self.largest <= LARGE) & (self.few >= CONCENTRATED) & (self.top > 1 / RANGE) & (self.top < RANGE)
        doubt = ~(held & self.z_task.isfinite())  # also where one of them is NaN
        for name, squares, dots, moved in (("cosine", aa, ac, cc), ("cosine_weights", bb, bd, dd)):
            if name in metrics:
                doubt |= moved * squares - dots.square() < CANCELLED * moved * squares
        return doubt

    def scores(self, metrics: Sequence[str]) -> dict[str, Tensor]:
        """Every metric that is a sum over tiles, float64 [heads]."""
        dd, bb, bd = self.squares.unbind(1)
        steps, kl, js, aa, ac, cc = self.scans.view(*self.shape, SCANS).double().sum(1).unbind(1)[:6]
        every = {
            "pad_index": lambda: steps / self.z_task,
            "pad": lambda: steps / self.z_task / (self.sizes - 1).clamp(min=1),
            "kl": lambda: kl / self.z_base,
            "js": lambda: js / self.z_base,
            "cosine": lambda: cosine_distance(
                aa / self.z_base**2, ac / (self.z_base * self.z_task), cc / self.z_task**2),
            "cosine_weights": lambda: cosine_distance(bb, bd, dd),
            "euclidean": lambda: dd.sqrt(),
            "relative": lambda: torch.where(dd == 0, 0.0, (dd / bb).sqrt()),
        }
        return {name: every[name]() for name in metrics}
