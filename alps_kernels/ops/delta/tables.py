"""Tables and launches of the scoring kernels, and the scores in the sums that they leave."""

from __future__ import annotations

from array import array
from collections import namedtuple
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..device import device_code, on_device, pinned_bytes, send, triton_type
from ..launching import launching
from .small_changes import CONCENTRATED, cosine_distance

LANES = 64 if torch.version.hip else 32  # threads of a warp
FLAT_TILE, TILE = 2048, 128  # elements of a tile of a flat matrix, of another
RUNS = 16  # tiles of a program side by side, where matrices are not flat
SLOTS = 128  # tiles of a head at a time between the passes
SCANS = 8  # programs of a head in pass B
# Pass A takes exp(logit) without a shift. A head whose largest is beyond this, or below its inverse, is doubtful:
# logits so far from 0 have float32 digits too few, and the sums of the latter may underflow.
RANGE = 2.0**32
LARGE = 1.0  # |x| beyond which a weight that dominates leaves a small Z_T to float32 rounding: then float64
# The sum of abs(CDF difference) may be a small rest of changes that nearly cancel, of which float32 leaves rounding:
# it is doubtful if |r| sqrt(n) or sqrt(sum x^2), times Z, is so many times larger. Of a change whose part across its
# base is a smaller share of its square than ACROSS, float32 sums leave that part to rounding.
SHIFTED, MOVED, ACROSS = 8.0, 32.0, 0.1
FAINT = 1e-36  # a mean square below it is of squares that underflow

# Rows of tables, as csrc_triton has them. Of matrices of a kind: the row of their first tile in `stats`, tiles of a
# matrix and of a row of it, elements of a row and of a tile. Of a head: float64 sums, up to `cc` from both passes.
KindRow = namedtuple("KindRow", "first tiles tiles_of_run run tile")
SumRow = namedtuple("SumRow", "steps kl js aa ac cc z dd bb bd r top far listed _ _", rename=True)
STATS = 18  # columns of `stats`
Kind = namedtuple("Kind", "base task flat rows cols strides")  # of matrices of one launch: dtypes, shape, both strides


def _kind(s: Any) -> Kind:
    """Flat: taken for one row, [1, elements]; contiguous, in whole tiles, aligned for loads of 16 bytes."""
    (_, rows, cols), strides, flat = s.base.shape, (), True
    for side in (s.base, s.task):
        step, *own = side.stride()
        strides += tuple(own)
        flat &= own == [cols, 1] and (side.data_ptr() | step * side.element_size()) % 16 == 0
    flat &= rows * cols % FLAT_TILE == 0
    shape = (1, rows * cols, (0, 1, 0, 1)) if flat else (rows, cols, strides)
    return Kind(s.base.dtype, s.task.dtype, flat, *shape)


def _row(kind: Kind, first: int) -> KindRow:
    tile = FLAT_TILE if kind.flat else TILE
    return KindRow(first, kind.rows * -(-kind.cols // tile), -(-kind.cols // tile), kind.cols, tile)


def flat_sums(layers: Sequence[Sequence[Any]], tau: float, every: bool) -> Sums:
    """Both passes over heads whose elements are stored (every representation but `projection`).

    Pass A reads each matrix once, whichever heads read it; matrices of a kind are one launch.

    Args:
        every: for all metrics, not `pad` and `euclidean` alone.
    """
    matrices: dict[Kind, tuple[array, array]] = {}  # their addresses in the base and in the task model
    heads = Heads()
    for layer in layers:
        columns, kinds = [], [_kind(s) for s in layer]
        for s, kind in zip(layer, kinds, strict=True):
            bases, tasks = matrices.setdefault(kind, (array("q"), array("q")))
            read, places = _order(s.index)
            columns.append([len(bases) + place for place in places])
            bases.extend(addresses(s.base, read))
            tasks.extend(addresses(s.task, read))
        heads.add(columns, [[*matrices].index(kind) for kind in kinds], sum(kind.rows * kind.cols for kind in kinds),
                  sum(_row(kind, 0).tiles for kind in kinds))
    rows, tiles = [], 0
    for kind, (bases, _) in matrices.items():
        rows.append(_row(kind, tiles))
        tiles += len(bases) * rows[-1].tiles
    t = Tables(heads, rows, tiles, layers[0][0].base.device, *chain(*matrices.values()))
    kernels, stats, scans = device_code("head_delta"), [], []
    for i, (kind, row) in enumerate(zip(matrices, rows, strict=True)):
        (bases, tasks), count = t.others[2 * i:2 * i + 2], len(matrices[kind][0])
        runs, lanes = (1, LANES) if kind.flat else (RUNS, RUNS * TILE // 16)
        scalars = kind.rows, kind.cols, *kind.strides, 1 / tau
        options = {"BASE": triton_type(kind.base), "TASK": triton_type(kind.task), "FLAT": kind.flat, "TILE": row.tile,
                   "RUNS": runs, "LANES": lanes, "enable_fp_fusion": True}
        warps = lanes // LANES
        stats.append(partial(kernels.head_delta_stats_kernel[(count * row.tiles_of_run * -(-kind.rows // runs),)],
                             bases, tasks, t.stats[row.first:], *scalars, ALL=every,
                             # two threads a lane where tiles are transposed, which takes registers
                             num_warps=warps if kind.flat else 2 * warps, **options))
        scans.append(partial(kernels.head_delta_scan_kernel[(len(heads.sizes), SCANS)], bases, tasks, *t.of_scan(i),
                             row.first, row.first + count * row.tiles, *scalars, num_warps=warps, **options))
    return t.run(stats, scans, tau, every)


@lru_cache(64)  # layers are alike
def _order(index: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
    """Each matrix once, in the order in which heads first read it; and the place there of what each head reads."""
    place = {matrix: i for i, matrix in enumerate(dict.fromkeys(index))}
    return tuple(place), [place[matrix] for matrix in index]


def addresses(blocks: Tensor, index: Iterable[int]) -> list[int]:
    start, step = blocks.data_ptr(), blocks.stride(0) * blocks.element_size()
    return [start + i * step for i in index]


class Heads:
    """Which matrices heads read, in order: `places` among those of their `kinds`; head h from first[h] on."""

    def __init__(self) -> None:
        self.first, self.places, self.kinds, self.sizes, self.slots = array("q", [0]), array("q"), array("q"), [], 0

    def add(self, columns: Sequence[Sequence[int]], kinds: list[int], size: int, tiles: int) -> None:
        """Heads of a layer, of this size and these tiles: of each matrix that they read, the places and the kind."""
        count = len(columns[0])
        self.places.extend(chain(*zip(*columns, strict=True)))
        self.kinds.extend(kinds * count)
        self.first.extend(range(self.first[-1] + len(kinds), len(self.places) + 1, len(kinds)))
        self.sizes += [size] * count
        self.slots = max(self.slots, tiles)


class Tables:
    """What the kernels share, on the device; `others`: copies of arrays that only some of them read.

    One upload, which the host does not wait for; every array begins at a multiple of 16 bytes.
    """

    def __init__(self, heads: Heads, kinds: list[KindRow], tiles: int, device: torch.device, *others: array) -> None:
        arrays = [heads.first, heads.places, heads.kinds, array("q", chain(*kinds)), *others]
        lengths = [len(values) + len(values) % 2 for values in arrays]
        pinned = pinned_bytes(8 * sum(lengths), device).view(torch.int64)
        for piece, values in zip(pinned.split(lengths), arrays, strict=True):
            piece[:len(values)] = torch.frombuffer(values, dtype=torch.int64)
        there = torch.empty_like(pinned, device=device)
        send(pinned, there)
        self._heads, self.others = there.split(lengths)[:4], there.split(lengths)[4:]
        count, self._sizes = len(heads.sizes), torch.tensor(heads.sizes, dtype=torch.float64, device="cpu")
        self.stats = torch.empty(tiles, STATS, dtype=torch.float32, device=device)
        self._list = torch.empty(count, heads.slots, dtype=torch.int32, device=device)
        self._carries = torch.empty(count, heads.slots, dtype=torch.float32, device=device)
        self._sums = torch.zeros(1 + len(kinds) * SCANS, count, len(SumRow._fields), dtype=torch.float64, device=device)

    def of_scan(self, kind: int) -> tuple:
        """What pass B over matrices of this kind is given of these."""
        return self._list, self._carries, self._sums[0], self._sums[1 + kind * SCANS:], self._list.shape[1]

    def run(self, stats: list[partial], scans: list[partial], tau: float, every: bool) -> Sums:
        """Launch both passes and what is between them; wait for the device once."""
        with on_device(self.stats.device), launching():
            for launch in stats:
                launch()
            device_code("delta_heads").list_tiles_kernel[(len(self._sizes),)](
                *self._heads, self.stats, self._list, self._carries, self._sums, self._list.shape[1],
                ALL=every, SLOTS=SLOTS, num_warps=2, enable_fp_fusion=True)
            for launch in scans:
                launch()
            return Sums(self._sums.sum(0).cpu(), self._sizes, 1 / tau)


class Sums:
    """The sums of heads over both passes, and the scores that they make.

    Attributes:
        s: by column, float64 [heads], on the CPU; sizes: elements of each head.
    """

    def __init__(self, sums: Tensor, sizes: Tensor, inv_tau: float) -> None:
        self.s, self.sizes, self.inv_tau = SumRow(*sums.unbind(1)), sizes, inv_tau
        self.z_task = self.s.z * (1 + self.s.r)

    def doubtful(self, metrics: Sequence[str]) -> Tensor:
        """Which heads the float32 sums may miss, bool [heads]: they are rare, and the CPU backend takes them."""
        s, wanted, moved = self.s, set(metrics), self.s.dd.sqrt()
        doubt = ~s.dd.isfinite() | ((s.steps != 0) | (s.r != 0)) & (s.dd < FAINT * self.sizes)
        if wanted & {"cosine_weights", "relative"}:
            doubt |= ~s.bb.isfinite() | (s.bb != 0) & (s.bb < FAINT * self.sizes)
        if wanted - {"cosine_weights", "relative", "euclidean"}:
            held = (s.far <= LARGE) & (s.z >= CONCENTRATED * s.top) & (s.top > 1 / RANGE) & (s.top < RANGE)
            doubt |= ~(held & self.z_task.isfinite())  # also where one of them is NaN
        if wanted & {"pad", "pad_index"}:
            doubt |= s.r.abs() * s.z * self.sizes.sqrt() > SHIFTED * s.steps
            doubt |= moved * self.inv_tau * s.z > MOVED * s.steps
        for name, squares, dots, moves in (("cosine", s.aa, s.ac, s.cc), ("cosine_weights", s.bb, s.bd, s.dd)):
            if name in wanted:
                doubt |= moves * squares - dots.square() < ACROSS * moves * squares
        return doubt

    def scores(self, metrics: Sequence[str]) -> dict[str, Tensor]:
        """Every metric that is a sum over tiles, float64 [heads]."""
        s = self.s
        every = {
            "pad_index": lambda: s.steps / self.z_task,
            "pad": lambda: s.steps / self.z_task / (self.sizes - 1).clamp(min=1),
            "kl": lambda: s.kl / s.z,
            "js": lambda: s.js / s.z,
            "cosine": lambda: cosine_distance(s.aa / s.z**2, s.ac / (s.z * self.z_task), s.cc / self.z_task**2),
            "cosine_weights": lambda: cosine_distance(s.bb, s.bd, s.dd),
            "euclidean": lambda: s.dd.sqrt(),
            "relative": lambda: torch.where(s.dd == 0, 0.0, (s.dd / s.bb).sqrt()),
        }
        return {name: every[name]() for name in metrics}
