"""Both passes of `head_delta` over stored matrices: heads of every representation but `projection`.

The issue of instructions must not bound what memory can bring. So a program is one warp that goes through its tile
in chunks: each lane takes 16 neighbours at a time, 64 elements in all, before anything crosses lanes.
"""

import triton
import triton.language as tl

from .delta_heads import SUM_FIELDS, load_head, load_listed, store_sums
from .delta_sums import (
    STAT_FIELDS, add_each, add_squares, each, first_and_second, lanes, largest, scan, scanned, store_stats, to_lanes,
    weigh, zeros,
)
from .series import TAYLOR


@triton.jit
def _flat_eight(pointer, first):
    """8 neighbours of each lane, from `first` on, float32 [lanes, 8]."""
    if pointer.dtype.element_ty == tl.bfloat16:  # two in a word: one instruction each makes them float32
        words = pointer.to(tl.pointer_type(tl.int32))
        pair = tl.load(words + (first[:, None] // 2 + tl.arange(0, 4)[None, :]))
        even, odd = (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(even, odd), (pair.shape[0], 8))
    else:
        return tl.load(pointer + (first[:, None] + tl.arange(0, 8)[None, :])).to(tl.float32)


@triton.jit
def _sixteen(tiles, chunk, lane, RUNS: tl.constexpr, FLAT: tl.constexpr):
    """Of 16 neighbours of each lane of a chunk, the first and the second 8: base, difference, what is there."""
    base, task, n, base_col, task_col = tiles
    first = chunk + lane * 16
    if FLAT:
        b0, b1 = _flat_eight(base, first), _flat_eight(base, first + 8)
        d0, d1 = _flat_eight(task, first) - b0, _flat_eight(task, first + 8) - b1
    else:  # rows may be neighbours in memory: the tile is transposed, not the access
        col = chunk + tl.arange(0, lane.shape[0] // RUNS * 16).to(tl.int64)[None, :]
        b = tl.load(base + col * base_col, mask=col < n[:, None], other=0.0).to(tl.float32)
        d = tl.load(task + col * task_col, mask=col < n[:, None], other=0.0).to(tl.float32) - b
        b0, b1 = first_and_second(b)
        d0, d1 = first_and_second(d)
    place, end = first[:, None] + tl.arange(0, 8)[None, :], n if FLAT else to_lanes(n, lane.shape[0], RUNS)[:, None]
    return (b0, d0, place < end), (b1, d1, place + 8 < end)


@triton.jit
def _store_stats(out, tiles, lane, inv_tau, TILE: tl.constexpr, RUNS: tl.constexpr, FLAT: tl.constexpr,
                 ALL: tl.constexpr, EXACT: tl.constexpr):
    squares, sums = zeros(1, lane.shape[0], 4)[0], zeros(8 if ALL else 0, lane.shape[0], 4)
    pieces, n = (), tiles[2]
    for chunk in tl.static_range(0, TILE, lane.shape[0] // RUNS * 16):
        left, right = _sixteen(tiles, chunk, lane, RUNS, FLAT)
        behind = (TILE if FLAT else to_lanes(n, lane.shape[0], RUNS)) - 16 - chunk - lane * 16
        squares = add_squares(squares, left, right)
        piece, sums = weigh(left, right, behind, inv_tau, sums, not FLAT, ALL, EXACT)
        pieces = pieces + (piece,)
    return store_stats(out, n > 0, pieces, squares, sums, inv_tau, RUNS)


@triton.jit
def head_delta_stats_kernel(
    bases_ptr, tasks_ptr, stats_ptr, rows, cols, base_row, base_col, task_row, task_col, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, ALL: tl.constexpr,
    TILE: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr,
):
    """Pass A: statistics of every tile of every matrix, from one read of both models.

    The rows of a matrix are cut into tiles of TILE elements. A program takes one tile of each of RUNS rows.

    Shapes     bases, tasks [n] int64: addresses of matrices [rows, cols]; strides in elements;
               stats [n * rows * tiles of a row, 18] float32, see `store_stats`
    Dtypes     weights fp32/fp16/bf16; arithmetic and sums fp32, at most TILE terms each
    Scalars    inv_tau = 1 / tau; FLAT: rows = 1, strides 1, TILE divides cols, addresses are multiples of 16
    Untouched  of a row of stats what only ALL metrics need
    Bytes      one read of each weight: 4 per pair of bf16 weights, 8 of fp32
    """
    of_run, groups, program = tl.cdiv(cols, TILE), tl.cdiv(rows, RUNS), tl.program_id(0)
    part, inside = program // (of_run * groups), program % (of_run * groups)
    tile, run = inside // groups, ((inside % groups) * RUNS + each(RUNS)).to(tl.int64)
    start, n = tile.to(tl.int64) * TILE, tl.where(run < rows, tl.minimum(cols - tile * TILE, TILE), 0)
    tiles = _tiles(tl.load(bases_ptr + part), tl.load(tasks_ptr + part), run, start, n,
                   base_row, base_col, task_row, task_col, BASE, TASK, FLAT)
    out, lane = stats_ptr + ((part.to(tl.int64) * rows + run) * of_run + tile) * STAT_FIELDS, lanes(LANES, RUNS)
    far = _store_stats(out, tiles, lane, inv_tau, TILE, RUNS, FLAT, ALL, False)
    if largest(far, RUNS) > TAYLOR:  # read once more, for what the short series does not give
        _store_stats(out, tiles, lane, inv_tau, TILE, RUNS, FLAT, ALL, True)


@triton.jit
def _tiles(base, task, run, start, n, base_row, base_col, task_row, task_col,
           BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr):
    """What `_sixteen` reads tiles of n elements by: pointers to their first ones, [RUNS, 1]; if FLAT, to the one's."""
    base, task = base.to(tl.pointer_type(BASE)), task.to(tl.pointer_type(TASK))
    if FLAT:
        return tl.multiple_of(base + start, 16), tl.multiple_of(task + start, 16), n, base_col, task_col
    else:
        base, task = base + (run * base_row + start * base_col), task + (run * task_row + start * task_col)
        return base[:, None], task[:, None], n, base_col, task_col


@triton.jit
def _scan(carry, exact, tiles, lane, r, inv_tau, TILE: tl.constexpr, RUNS: tl.constexpr, FLAT: tl.constexpr,
          EXACT: tl.constexpr):
    sums = zeros(6 if EXACT else 1, lane.shape[0], 0)
    if EXACT:  # the rare ones: short code
        for chunk in tl.range(0, TILE, lane.shape[0] // RUNS * 16):
            left, right = _sixteen(tiles, chunk, lane, RUNS, FLAT)
            carry, sums = scan(left, right, carry, r, inv_tau, sums, RUNS, not FLAT, EXACT)
    else:
        for chunk in tl.static_range(0, TILE, lane.shape[0] // RUNS * 16):
            left, right = _sixteen(tiles, chunk, lane, RUNS, FLAT)
            carry, sums = scan(left, right, carry, r, inv_tau, sums, RUNS, not FLAT, EXACT)
    return scanned(sums, to_lanes(exact, lane.shape[0], RUNS))


@triton.jit
def head_delta_scan_kernel(
    bases_ptr, tasks_ptr, list_ptr, carries_ptr, heads_ptr, sums_ptr, slots, first_row, end_row,
    rows, cols, base_row, base_col, task_row, task_col, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr,
    TILE: tl.constexpr, RUNS: tl.constexpr, LANES: tl.constexpr,
):
    """Pass B: the CDF differences in the tiles listed for it, from a second read of these.

    Program (h, i) takes RUNS tiles of head h's list at a time, every num_programs(1)-th. Those that are not among
    the rows first_row .. end_row of stats are of matrices of another kind.

        c_i = e_i (u_i - r) = (P_T - P_B)_i Z_T;  cdf_i = carry + sum_{j <= i} c_j;  sum of abs(cdf_i)

    The head's last element, where both CDFs are 1, stays: there, cdf_i is 0 but for rounding.

    Shapes     list, carries, heads as `list_tiles_kernel` wrote them; sums [num_programs(1), n, 16] float64
    Dtypes     weights fp32/fp16/bf16; arithmetic fp32, sums over tiles fp64; carries come from float64 sums
    Scalars    those of pass A
    Untouched  columns of `sums` that come from pass A alone
    Bytes      one read of each weight that is in a listed tile
    """
    head, of_run, lane = tl.program_id(0).to(tl.int64), tl.cdiv(cols, TILE), lanes(LANES, RUNS)
    r, listed = load_head(heads_ptr, head)
    sums, i = scanned((), True), tl.program_id(1) * RUNS
    while i < listed:
        row, mine, exact, carry = load_listed(
            list_ptr, carries_ptr, head * slots, i + each(RUNS), listed, first_row, end_row)
        if largest(mine.to(tl.int32), RUNS) > 0:
            part, inside = row // (rows * of_run), row % (rows * of_run)
            start = (inside % of_run) * TILE
            n = tl.where(mine, tl.minimum(cols - start, TILE), 0)
            tiles = _tiles(tl.load(bases_ptr + part), tl.load(tasks_ptr + part), (inside // of_run).to(tl.int64),
                           start.to(tl.int64), n, base_row, base_col, task_row, task_col, BASE, TASK, FLAT)
            if largest(exact.to(tl.int32), RUNS) > 0:
                more = _scan(carry, exact, tiles, lane, r, inv_tau, TILE, RUNS, FLAT, True)
            else:
                more = _scan(carry, exact, tiles, lane, r, inv_tau, TILE, RUNS, FLAT, False)
            sums = add_each(sums, more)
        i += tl.num_programs(1) * RUNS
    store_sums(sums_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * SUM_FIELDS, sums)
