"""Per-head statistics and the PAD scan over a base and a task model.

The issue of instructions must not bound what memory can bring. So a program is one warp that goes through
its tile in chunks: each lane takes 8 or 16 neighbours at a time, and 64 elements before anything crosses lanes.
"""

import triton
import triton.language as tl

from .delta_sums import (
    SCAN_FIELDS, START_CARRY, START_FAR, START_GROWTH, STAT_FAR, STAT_FIELDS, STAT_MOVED, add_products, bound,
    halves, last_of_8, lengths, load_start, step, store_scan, store_stats, sum_all,
)
from .series import LOG2E, TAYLOR, expm1_less

# Columns of the tables `tiles` and `segments`, as in ops/delta/tables.py, and the lengths of their rows.
TILE_BASE, TILE_TASK, TILE_SLOT, TILE_COUNT, TILE_LAST = map(tl.constexpr, range(5))
TILE_SEGMENT, TILE_START = TILE_BASE, TILE_TASK  # of a tile that is not flat
TILE_FIELDS = tl.constexpr(5)
SEGMENT_BASE, SEGMENT_TASK, SEGMENT_COLS = map(tl.constexpr, range(3))
SEGMENT_BASE_ROW, SEGMENT_BASE_COL, SEGMENT_TASK_ROW, SEGMENT_TASK_COL = map(tl.constexpr, range(3, 7))  # strides
SEGMENT_FIELDS = tl.constexpr(8)


@triton.jit
def _places(row, segments_ptr, FLAT: tl.constexpr):
    """Where `_read` finds a tile in both models."""
    if FLAT:
        return (tl.load(row + TILE_BASE), 0, 0, 0, 0, 0), (tl.load(row + TILE_TASK), 0, 0, 0, 0, 0)
    else:
        segment = segments_ptr + tl.load(row + TILE_SEGMENT) * SEGMENT_FIELDS
        start, cols = tl.load(row + TILE_START), tl.load(segment + SEGMENT_COLS)
        at, col, width = start // cols, (start % cols).to(tl.int32), cols.to(tl.int32)
        base = (tl.load(segment + SEGMENT_BASE), at, col, width,
                tl.load(segment + SEGMENT_BASE_ROW), tl.load(segment + SEGMENT_BASE_COL))
        task = (tl.load(segment + SEGMENT_TASK), at, col, width,
                tl.load(segment + SEGMENT_TASK_ROW), tl.load(segment + SEGMENT_TASK_COL))
        return base, task


@triton.jit
def _count(row, FLAT: tl.constexpr):
    """How many elements a tile has."""
    count = tl.load(row + TILE_COUNT).to(tl.int32)
    return tl.multiple_of(count, 16) if FLAT else count


@triton.jit
def _read(place, first, there, DTYPE: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr):
    """8 elements of a tile from each of `first` on, float32 [n, 8]; zeros beyond its `there`.

    `place`: the address of the tile's first element if FLAT (contiguous, 16-byte aligned, every length a
    multiple of 16 elements), else of the matrix, and the tile's first row and column, the matrix's columns
    and its strides.
    """
    n: tl.constexpr = first.shape[0]
    address, row, col, cols, stride_row, stride_col = place
    if FLAT and DTYPE == tl.bfloat16:  # two of them in a word: one instruction each makes them float32
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)
        offs = first[:, None] // 2 + tl.arange(0, 4)[None, :]
        if FULL:
            pair = tl.load(words + offs)
        else:
            pair = tl.load(words + offs, mask=offs < there // 2, other=0)
        even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (n, 8))
    else:
        offs = first[:, None] + tl.arange(0, 8)[None, :]
        pointer = address.to(tl.pointer_type(DTYPE))
        if FLAT:
            pointer = tl.multiple_of(pointer, 16) + offs
        else:
            at = col + offs
            pointer += (row + at // cols) * stride_row + (at % cols) * stride_col
        if FULL:
            return tl.load(pointer).to(tl.float32)
        else:
            return tl.load(pointer, mask=offs < there, other=0.0).to(tl.float32)


@triton.jit
def _moved_far(
    base, task, there, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):
    """A tile's sum of e u and its largest abs(x), read once more: the short series does not hold in it."""
    moved, farthest = tl.zeros((LANES, 4), tl.float32), tl.zeros((LANES, 8), tl.float32)
    for chunk in tl.range(0, BLOCK, LANES * 8):
        first = chunk + tl.arange(0, LANES) * 8
        b = _read(base, first, there, BASE, FLAT, FULL)
        d = _read(task, first, there, TASK, FLAT, FULL) - b
        # where nothing is, d = 0 adds nothing
        moved = add_products(moved, tl.exp2(b * (inv_tau * LOG2E)), expm1_less(d, 0.0, inv_tau, True))
        farthest = tl.maximum(farthest, tl.abs(d))
    return sum_all(moved), tl.max(tl.ravel(farthest), axis=0) * inv_tau


@triton.jit
def head_delta_stats_kernel(
    tiles_ptr, segments_ptr, stats_ptr, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, NORMS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):
    """Pass A: statistics of every tile of every head, from one read of both models.

    Program w owns tile w of the work list: BLOCK elements of one segment of one head, LANES * 8 at a time.

        e = exp(b / tau);  u = expm1((t - b) / tau)
        sums of e, e u, (t - b)^2, with NORMS of b^2 and b (t - b)
        bounds of e and of abs((t - b) / tau): partial sums of e, roots of partial sums of (t - b)^2

    Every change is taken for a small one. A tile where the second bound says otherwise is read again, and
    has its largest abs((t - b) / tau) itself for bound.

    Shapes     tiles [n_tiles, 5], segments [n, 8] int64; stats [n_slots, 8] float32
    Dtypes     weights fp32/fp16/bf16; arithmetic and sums fp32, at most BLOCK terms each
    Scalars    inv_tau = 1 / tau; FLAT, the tiles have addresses, else segments; FULL, they have BLOCK elements each
    Untouched  slots without a tile stay zero
    Bytes      one read of each weight: 4 per pair of bf16 weights, 8 of fp32
    """
    row = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    base, task = _places(row, segments_ptr, FLAT)
    there = _count(row, FLAT)
    e_sum = tl.zeros((LANES, 4), tl.float32)
    moved, dd, bb, bd = e_sum, e_sum, e_sum, e_sum
    for chunk in tl.static_range(0, BLOCK, LANES * 8):
        first = chunk + tl.arange(0, LANES) * 8
        b = _read(base, first, there, BASE, FLAT, FULL)
        t = _read(task, first, there, TASK, FLAT, FULL)
        bs, ts = halves(b), halves(t)
        for half in tl.static_range(2):
            b = bs[half]
            d = ts[half] - b
            e = tl.exp2(b * (inv_tau * LOG2E))
            if not FULL:
                e = tl.where(first[:, None] + tl.arange(0, 4)[None, :] * 2 + half < there, e, 0.0)
            e_sum += e
            moved = tl.fma(e, expm1_less(d, 0.0, inv_tau, False), moved)
            dd = tl.fma(d, d, dd)
            if NORMS:
                bb, bd = tl.fma(b, b, bb), tl.fma(b, d, bd)
    out = stats_ptr + tl.load(row + TILE_SLOT) * STAT_FIELDS
    # ahead of the branch: else the sums are formed behind it, from what they sum
    store_stats(out, e_sum, dd, bb, bd, NORMS)
    moves, farthest = sum_all(moved), bound(dd, inv_tau)
    if farthest > TAYLOR:
        moves, farthest = _moved_far(base, task, there, inv_tau, BASE, TASK, FLAT, FULL, BLOCK, LANES)
    tl.store(out + STAT_MOVED, moves)
    tl.store(out + STAT_FAR, farthest)


@triton.jit
def _scan_chunk(
    chunk, state, base, task, there, counted, start, inv_tau, BASE: tl.constexpr, TASK: tl.constexpr,
    FLAT: tl.constexpr, FULL: tl.constexpr, EXTRA: tl.constexpr, EXACT: tl.constexpr, LANES: tl.constexpr,
):
    """16 neighbours of each lane, whose 32 bytes are one sector of memory: carry, steps and sums behind them."""
    carry, steps, sums = state
    eight = tl.arange(0, 8)[None, :]
    left = chunk + tl.arange(0, LANES) * 16
    right = left + 8
    b = _read(base, left, there, BASE, FLAT, FULL)
    d = _read(task, left, there, TASK, FLAT, FULL) - b
    inside, sums = step(b, d, left[:, None] + eight < there, start, inv_tau, sums, FULL, EXTRA, EXACT)
    b = _read(base, right, there, BASE, FLAT, FULL)
    d = _read(task, right, there, TASK, FLAT, FULL) - b
    beyond, sums = step(b, d, right[:, None] + eight < there, start, inv_tau, sums, FULL, EXTRA, EXACT)
    half = last_of_8(inside)
    whole = half + last_of_8(beyond)
    before = carry + (tl.cumsum(whole, axis=0) - whole)
    steps += lengths(inside, before, left[:, None] + eight < counted, FULL)
    steps += lengths(beyond, before + half, right[:, None] + eight < counted, FULL)
    return carry + tl.sum(whole, axis=0), steps, sums


@triton.jit
def _scan_tile(
    base, task, there, counted, start, inv_tau, out, BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr,
    FULL: tl.constexpr, EXTRA: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):
    none = tl.zeros((LANES, 4), tl.float32)
    state = (start[START_CARRY], tl.zeros((LANES,), tl.float32), (none, none, none, none, none, none))
    if EXACT or not FLAT or BASE != TASK:  # the rare ones: short code
        for chunk in tl.range(0, BLOCK, LANES * 16):
            state = _scan_chunk(chunk, state, base, task, there, counted, start, inv_tau,
                                BASE, TASK, FLAT, FULL, EXTRA, EXACT, LANES)
    else:
        for chunk in tl.static_range(0, BLOCK, LANES * 16):
            state = _scan_chunk(chunk, state, base, task, there, counted, start, inv_tau,
                                BASE, TASK, FLAT, FULL, EXTRA, EXACT, LANES)
    _, steps, sums = state
    store_scan(out, steps, sums, start[START_GROWTH], EXTRA, EXACT)


@triton.jit
def head_delta_scan_kernel(
    tiles_ptr, segments_ptr, starts_ptr, scans_ptr, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):
    """Pass B: the distribution functions' difference, tile by tile from carries of pass A.

    Program w owns tile n - 1 - w of the n of the work list: what pass A read last is still in L2.

        e = exp(b / tau) / 2^shift;  change_i = e_i (u_i - r) = (P_T - P_B)_i Z_T
        cdf_i = carry + sum_{j <= i} change_j;  sum of abs(cdf_i)
        EXTRA: KL, JS and cosine from sums of e m^2, e m^3, e m^4 (m = u - r), e^2, e change, change^2

    The head's last element, where both CDFs are 1, is left out; in a FULL tile it stays, for it is 0 but for
    rounding and one of many.

    Shapes     starts [n_slots, 5] float32: carry, shift, r, 1 / (1 + r), a bound of abs(x) + abs(r);
               scans [n_slots, 8] float32
    Dtypes     weights fp32/fp16/bf16; arithmetic fp32; carries come from float64 sums
    Scalars    inv_tau = 1 / tau; FLAT and FULL as in pass A
    Untouched  slots without a tile stay zero
    Bytes      a second read of each weight: 4 per pair of bf16 weights, 8 of fp32
    """
    row = tiles_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TILE_FIELDS
    base, task = _places(row, segments_ptr, FLAT)
    slot, there = tl.load(row + TILE_SLOT), _count(row, FLAT)
    counted = there - tl.load(row + TILE_LAST).to(tl.int32)
    start, out = load_start(starts_ptr, slot), scans_ptr + slot * SCAN_FIELDS
    if start[START_FAR] <= TAYLOR:
        _scan_tile(base, task, there, counted, start, inv_tau, out, BASE, TASK, FLAT, FULL, EXTRA, False, BLOCK, LANES)
    else:
        _scan_tile(base, task, there, counted, start, inv_tau, out, BASE, TASK, FLAT, FULL, EXTRA, True, BLOCK, LANES)
