"""Tables and launches of the scoring kernels: work lists, carries between tiles, scores from their sums."""

from __future__ import annotations

from collections import defaultdict, namedtuple
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from ..device import device_code, on_device, triton_type
from ..launching import launching
from .small_changes import CANCELLED, CONCENTRATED, cosine_distance

BLOCK = 2048  # elements of a tile: 64 for each thread of a warp
LANES = 64 if torch.version.hip else 32  # threads of a warp
ROWS, K_BLOCK = 16, 32  # of a projection's tile; with d_v = 128 a tile is 2,048 elements
# Pass A takes exp(logit) without a shift. A head whose largest is beyond this, or below its inverse, is doubtful:
# logits so far from 0 have float32 digits too few, and the sums of the latter may underflow.
RANGE = 2.0**32
LARGE = 1.0  # |x| beyond which a weight that dominates leaves a small Z_T to float32 rounding: then float64
LAUNCHABLE = (torch.float32, torch.float16, torch.bfloat16)

# The columns of the kernels' tables, as in csrc_triton. int64 tables of addresses, counts and strides in elements:
# a tile that is not flat has its segment and its first element in it as `base` and `task`.
TileRow = namedtuple("TileRow", "base task slot count last")
SegmentRow = namedtuple("SegmentRow", "base task cols base_row base_col task_row task_col _", rename=True)
HeadRow = namedtuple("HeadRow", "q_base q_task group")
# float32 tables, a row a slot: what pass A sums, what pass B starts from, and what it sums.
StatRow = namedtuple("StatRow", "e moved dd bb bd top far _", rename=True)
StartRow = namedtuple("StartRow", "carry shift r growth far")
ScanRow = namedtuple("ScanRow", "steps kl js aa ac cc _ _", rename=True)


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
    with on_device(device), launching():
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
        groups = _whole_numbers(first + pairs[pair] for pair in zip(k.index, v.index, strict=True))
        rows.append(torch.stack(HeadRow(_addresses(q.base, q.index), _addresses(q.task, q.index), groups), 1))
    where = torch.cat(rows).to(device)  # [heads, HeadRow]
    m_base, m_task, m_delta = (torch.cat(product).float() for product in products)
    kernels = device_code("head_projection")
    heads = len(where)
    sums = Sums(heads, slots, torch.full((heads,), float(d_model * d_v), dtype=torch.float64, device=device))
    common = {
        "BASE": triton_type(q.base.dtype), "TASK": triton_type(q.task.dtype), "D_K": d_k, "D_V": d_v,
        "V_PAD": max(16, 1 << (d_v - 1).bit_length()), "ROWS": ROWS, "K_BLOCK": K_BLOCK,
        # Three passes of the tensor cores come to float32's precision; AMD's have float32 of their own.
        "PRECISION": "ieee" if torch.version.hip else "tf32x3", "enable_fp_fusion": True,
        # Triton's own 3 stages take up to 200 KB of shared memory, more than most GPUs have. Past 128 columns two
        # do too, and 4 warps spill registers.
        "num_stages": 1 if torch.version.hip or d_v > 128 else 2, "num_warps": 8 if d_v > 128 else 4,
    }
    strides = (d_model, q.base.stride(1), q.task.stride(1), 1 / tau)
    with on_device(device), launching():
        kernels.projection_stats_kernel[(heads, slots)](
            where, m_base, m_task, m_delta, sums.stats, *strides, NORMS=norms, **common)
        kernels.projection_scan_kernel[(heads, slots)](
            where, m_base, m_task, m_delta, sums.between(), sums.scans, *strides, EXTRA=extra, **common)
    return sums


def _group_products(k: Any, v: Any, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """M_B, M_T and dM = dk v_T^T + k_B dv^T of every group, float64 [groups, d_k, d_v]."""
    k_base, k_task = (side[[p[0] for p in pairs]].double() for side in (k.base, k.task))
    v_base, v_task = (side[[p[1] for p in pairs]].double() for side in (v.base, v.task))
    return (k_base @ v_base.mT, k_task @ v_task.mT,
            (k_task - k_base) @ v_task.mT + k_base @ (v_task - v_base).mT)


def _whole_numbers(values: Iterable[int]) -> Tensor:
    """int64, on the CPU whatever the default device is."""
    return torch.tensor([*values], dtype=torch.int64, device="cpu")


def _addresses(blocks: Tensor, index: Sequence[int]) -> Tensor:
    return blocks.data_ptr() + _whole_numbers(index) * (blocks.stride(0) * blocks.element_size())


def _work_list(layers: Sequence[Sequence[Any]], slots: int) -> tuple[dict[TileKind, Tensor], Tensor, list[int]]:
    """Tiles by launch [n, TileRow], segments [n, SegmentRow], each one matrix of one head, and sizes of heads."""
    tiles, segments, sizes = defaultdict(list), [], []
    n_segments = 0
    for layer in layers:
        heads = _whole_numbers(range(len(layer[0].index)))
        first_slot = (len(sizes) + heads) * slots
        for position, s in enumerate(layer):
            size, cols = s.base[0].numel(), s.base.shape[2]
            where = [_addresses(side, s.index) for side in (s.base, s.task)]
            row = SegmentRow(*where, *_whole_numbers((cols, *s.base.stride()[1:], *s.task.stride()[1:], 0)))
            segments.append(torch.stack(torch.broadcast_tensors(*row), 1))
            start = _whole_numbers(range(0, size, BLOCK))
            count = (size - start).clamp(max=BLOCK)
            last = torch.zeros_like(start)
            last[-1] = position == len(layer) - 1
            flat = all(side[0].is_contiguous() and bool((w % 16 == 0).all())
                       for side, w in zip((s.base, s.task), where, strict=True)) and size % 16 == 0
            at = ([w[:, None] + start * side.element_size() for side, w in zip((s.base, s.task), where, strict=True)]
                  if flat else [(n_segments + heads)[:, None], start])
            row = TileRow(*at, first_slot[:, None] + _whole_numbers(range(len(start))), count, last)
            grid = torch.stack(torch.broadcast_tensors(*row), -1)  # [heads, tiles of a head, TileRow]
            full = (count == BLOCK) & flat
            for which in (full, ~full):
                if which.any():
                    tiles[TileKind(s.base.dtype, s.task.dtype, flat, which is full)].append(
                        rearrange(grid[:, which], "head tile column -> (head tile) column"))
            n_segments += len(heads)
            first_slot = first_slot + len(start)
        sizes += [sum(s.base[0].numel() for s in layer)] * len(heads)
    return {key: torch.cat(grids) for key, grids in tiles.items()}, torch.cat(segments), sizes


class Sums:
    """The sums of both passes, and the scores that they make in float64.

    Attributes:
        stats, scans: float32 [heads, slots, StatRow or ScanRow].
    """

    def __init__(self, heads: int, slots: int, sizes: Tensor) -> None:
        self.sizes = sizes
        self.stats = sizes.new_zeros(heads, slots, len(StatRow._fields), dtype=torch.float32)
        self.scans = sizes.new_zeros(heads, slots, len(ScanRow._fields), dtype=torch.float32)

    def between(self) -> Tensor:
        """What each tile of pass B starts from, float32 [heads, slots, StartRow].

        The CDF difference before it, times Z_T; then, of its head, the shift with which e is 1 in the
        mean, r and 1 / (1 + r); and a bound of abs(x) + abs(r) in it.
        """
        s = StatRow(*self.stats.double().unbind(-1))
        z_base = s.e.sum(1, keepdim=True)
        self.top = s.top.amax(1)
        self.few = z_base.squeeze(1) / self.top
        r = s.moved.sum(1, keepdim=True) / z_base
        shift = (z_base / self.sizes[:, None]).log2().float()
        unit = shift.double().neg().exp2()
        self.z_base = (unit * z_base).squeeze(1)
        self.z_task = self.z_base * (1 + r.squeeze(1))
        change = unit * (s.moved - r * s.e)
        self.squares = tuple(square.sum(1) for square in (s.dd, s.bb, s.bd))
        self.largest = s.far.amax(1)
        starts = StartRow(change.cumsum(1) - change, shift, r, growth=1 / (1 + r), far=s.far + r.abs())
        return torch.stack(torch.broadcast_tensors(*starts), -1).float()

    @property
    def sound(self) -> Tensor:
        """Which heads have finite weights."""
        return self.squares[0].isfinite()

    def _summed(self) -> ScanRow:
        return ScanRow(*self.scans.double().sum(1).unbind(-1))

    def doubtful(self, metrics: Sequence[str]) -> Tensor:
        """Which heads the float32 sums may miss, bool [heads]: they are rare, and the CPU backend takes them."""
        (dd, bb, bd), s = self.squares, self._summed()
        held = (self.largest <= LARGE) & (self.few >= CONCENTRATED) & (self.top > 1 / RANGE) & (self.top < RANGE)
        doubt = ~(held & self.z_task.isfinite())  # also where one of them is NaN
        for name, squares, dots, moved in (("cosine", s.aa, s.ac, s.cc), ("cosine_weights", bb, bd, dd)):
            if name in metrics:
                doubt |= moved * squares - dots.square() < CANCELLED * moved * squares
        return doubt

    def scores(self, metrics: Sequence[str]) -> dict[str, Tensor]:
        """Every metric that is a sum over tiles, float64 [heads]."""
        (dd, bb, bd), s = self.squares, self._summed()
        every = {
            "pad_index": lambda: s.steps / self.z_task,
            "pad": lambda: s.steps / self.z_task / (self.sizes - 1).clamp(min=1),
            "kl": lambda: s.kl / self.z_base,
            "js": lambda: s.js / self.z_base,
            "cosine": lambda: cosine_distance(
                s.aa / self.z_base**2, s.ac / (self.z_base * self.z_task), s.cc / self.z_task**2),
            "cosine_weights": lambda: cosine_distance(bb, bd, dd),
            "euclidean": lambda: dd.sqrt(),
            "relative": lambda: torch.where(dd == 0, 0.0, (dd / bb).sqrt()),
        }
        return {name: every[name]() for name in metrics}
