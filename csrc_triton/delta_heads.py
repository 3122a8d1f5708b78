"""Between the passes of `head_delta`: sums of heads from their tiles' statistics, and the tiles that pass B scans.

With A_i and E_i the prefix sums of e u and e in a tile, c the CDF difference ahead of it (times Z_T) and
r = sum e u / sum e of the head, the CDF difference behind element i is c + A_i - r E_i. A tile of n elements adds the
sum of its absolute values, which is abs(n c + sum A_i - r sum E_i) unless its sign changes. It does not if c and what
the tile ends with share a sign and are both larger than all abs(A_i - E_i A_n / E_n): the rest of it is a straight
line in E_i. All other tiles are listed for pass B.
"""

import triton
import triton.language as tl

from .delta_sums import STAT_FIELDS, add_each
from .series import TAYLOR, divergences

SUM_R, SUM_TOP, SUM_FAR, SUM_LISTED = map(tl.constexpr, range(10, 14))  # columns of `sums`, see ops/delta/tables.py
SUM_FIELDS = tl.constexpr(16)
KIND_FIELDS = tl.constexpr(5)
LOST = tl.constexpr(0.8)  # share of the sum of e u^2 that may be r^2 Z: sums of e (u - r)^2 come from it


@triton.jit
def _stats(row, there, FIRST: tl.constexpr, N: tl.constexpr):
    """N columns of rows of `stats`, float64; zeros where not `there`."""
    columns = ()
    for i in tl.static_range(FIRST, FIRST + N):
        columns = columns + (tl.load(row + i, mask=there, other=0.0).to(tl.float64),)
    return columns


@triton.jit
def list_tiles_kernel(first_ptr, places_ptr, kinds_of_ptr, kinds_ptr, stats_ptr, list_ptr, carries_ptr, sums_ptr, slots,
                      ALL: tl.constexpr, SLOTS: tl.constexpr):
    """Program h: head h, which reads the matrices first[h] .. first[h + 1] of `places`, SLOTS tiles at a time.

    Of every tile that is not listed for pass B: its steps. Of every tile that pass B need not be exact for, if ALL:
    kl, js, and the sums of e^2, e c and c^2, where c = e (u - r).

    Shapes     first [n + 1], places and kinds_of [reads], kinds [kinds, 5] int64: a matrix's place among those of its
               kind; of a kind the first row in stats, tiles of a matrix, of a row of it, elements of a row, of a tile;
               stats as pass A wrote it; list [n, slots] int32: twice a tile's row in stats, plus 1 where pass B must
               be exact; carries [n, slots] float32; sums [n, 16] float64
    Dtypes     arithmetic float64
    Scalars    slots: tiles of the head that has most
    Untouched  of `list` and `carries` what is behind the listed tiles; two columns of `sums`
    Bytes      two reads of stats
    """
    head = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first_ptr + head), tl.load(first_ptr + head + 1)
    none = tl.zeros((SLOTS,), tl.float64)
    z, moved, m2, read = none, none, none, begin
    while read < end:
        kind = kinds_ptr + tl.load(kinds_of_ptr + read) * KIND_FIELDS
        tiles = tl.load(kind + 1)
        row = tl.load(kind) + tl.load(places_ptr + read) * tiles
        at = row * 0
        while at < tiles:
            slot = at + tl.arange(0, SLOTS)
            e, e_rest, a, a_rest = _stats(stats_ptr + (row + slot) * STAT_FIELDS, slot < tiles, 0, 4)
            z, moved = z + (e + e_rest), moved + (a + a_rest)
            if ALL:
                m2 += _stats(stats_ptr + (row + slot) * STAT_FIELDS, slot < tiles, 12, 1)[0]
            at += SLOTS
        read += 1
    z_all = tl.sum(z, axis=0)
    r = tl.sum(moved, axis=0) / z_all
    growth, near = 1.0 / (1.0 + r), TAYLOR - tl.abs(r)
    if ALL:
        near = tl.where(r * r * z_all > LOST * tl.sum(m2, axis=0), -1.0, near)

    carry, listed, read = z_all * 0.0, begin * 0, begin
    sums, top, far = (none, none, none, none, none, none, none, none, none, none), none, none
    while read < end:
        kind = kinds_ptr + tl.load(kinds_of_ptr + read) * KIND_FIELDS
        tiles, of_run, run, tile = tl.load(kind + 1), tl.load(kind + 2), tl.load(kind + 3), tl.load(kind + 4)
        row = tl.load(kind) + tl.load(places_ptr + read) * tiles
        at = row * 0
        while at < tiles:
            slot = at + tl.arange(0, SLOTS)
            there, stats = slot < tiles, stats_ptr + (row + slot) * STAT_FIELDS
            e, e_rest, a, a_rest, e_line, a_line, bridge, highest, farthest, dd = _stats(stats, there, 0, 10)
            e, a = e + e_rest, a + a_rest
            change = a - r * e
            after = carry + tl.cumsum(change, axis=0)
            before = after - change
            exact = there & (farthest > near)
            least = tl.minimum(tl.abs(before), tl.abs(after))
            # the bound is of float32 sums
            needed = there & ((before * after < 0.0) | (least < bridge * 1.00001))
            if ALL:
                needed = needed | exact
            n = tl.minimum(run - (slot % of_run) * tile, tile).to(tl.float64)
            steps = tl.where(there & (needed == 0), tl.abs(n * before + a_line - r * e_line), 0.0)
            to = head * slots + listed + tl.cumsum(needed.to(tl.int64), axis=0) - 1
            tl.store(list_ptr + to, ((row + slot) * 2 + exact).to(tl.int32), mask=needed)
            tl.store(carries_ptr + to, before.to(tl.float32), mask=needed)
            if ALL:
                short = there & (exact == 0)
                bb, bd = _stats(stats, there, 10, 2)
                e2, e3, e4, aa, ac, cc = _stats(stats, short, 12, 6)
                e1, e0 = tl.where(short, a, 0.0), tl.where(short, e, 0.0)
                kl, js = divergences(
                    e2 - r * (2.0 * e1 - r * e0), e3 - r * (3.0 * e2 - r * (3.0 * e1 - r * e0)),
                    e4 - r * (4.0 * e3 - r * (6.0 * e2 - r * (4.0 * e1 - r * e0))), growth)
                more = steps, kl, js, aa, ac - r * aa, cc - r * (2.0 * ac - r * aa), e, dd, bb, bd
            else:
                more = steps, none, none, none, none, none, e, dd, none, none
            sums, top, far = add_each(sums, more), tl.maximum(top, highest), tl.maximum(far, farthest)
            carry += tl.sum(change, axis=0)
            listed += tl.sum(needed.to(tl.int64), axis=0)
            at += SLOTS
        read += 1
    out = sums_ptr + head * SUM_FIELDS
    for i in tl.static_range(len(sums)):
        tl.store(out + i, tl.sum(sums[i], axis=0))
    tl.store(out + SUM_R, r)
    tl.store(out + SUM_TOP, tl.max(top, axis=0))
    tl.store(out + SUM_FAR, tl.max(far, axis=0))
    tl.store(out + SUM_LISTED, listed.to(tl.float64))


@triton.jit
def load_head(heads_ptr, head):
    """Its r, and how many tiles are listed."""
    row = heads_ptr + head * SUM_FIELDS
    return tl.load(row + SUM_R).to(tl.float32), tl.load(row + SUM_LISTED).to(tl.int32)


@triton.jit
def load_listed(list_ptr, carries_ptr, place, entry, listed, first, end):
    """Entries of the list at `place`: rows behind `first`, are these in front of `end`, is B to be exact, carries."""
    item = tl.load(list_ptr + place + entry, mask=entry < listed, other=-1)
    mine = (item // 2 >= first) & (item // 2 < end) & (entry < listed)
    carry = tl.load(carries_ptr + place + entry, mask=mine, other=0.0)
    return tl.where(mine, item // 2 - first, 0), mine, mine & (item % 2 == 1), carry


@triton.jit
def store_sums(row, sums):
    for i in tl.static_range(len(sums)):
        tl.store(row + i, sums[i])
