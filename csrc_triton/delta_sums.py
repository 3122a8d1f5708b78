"""Sums of the scoring kernels, in the lanes of a program until the end: one shuffle tree then serves a whole tile."""

import triton
import triton.language as tl

from .series import LOG2E, divergences, exact_divergences, expm1_less

# Columns of the tables `stats`, `starts` and `scans`, as in ops/delta/tables.py, and the lengths of their rows.
STAT_E, STAT_MOVED, STAT_DD, STAT_BB, STAT_BD, STAT_TOP, STAT_FAR = map(tl.constexpr, range(7))
STAT_FIELDS = tl.constexpr(8)
START_CARRY, START_SHIFT, START_R, START_GROWTH, START_FAR = map(tl.constexpr, range(5))
START_FIELDS = tl.constexpr(5)
SCAN_STEPS, SCAN_KL, SCAN_JS, SCAN_AA, SCAN_AC, SCAN_CC = map(tl.constexpr, range(6))
SCAN_FIELDS = tl.constexpr(8)


@triton.jit
def halves(x):
    """Every other element of rows [n, 2 m]: two [n, m]."""
    n: tl.constexpr = x.shape[0]
    m: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.reshape(x, (n, m, 2)))


@triton.jit
def add(total, x):
    x0, x1 = halves(x)
    return total + x0 + x1


@triton.jit
def add_products(total, x, y):
    x0, x1 = halves(x)
    y0, y1 = halves(y)
    return tl.fma(x1, y1, tl.fma(x0, y0, total))


@triton.jit
def sum_all(x):
    return tl.sum(tl.ravel(x), axis=0)


@triton.jit
def last_of_8(x):
    """The last of each row of 8."""
    _, x = halves(x)
    _, x = halves(x)
    _, x = halves(x)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def store_stats(out, e, dd, bb, bd, NORMS: tl.constexpr):
    """Sums of a tile from partial ones; the largest partial sum of e bounds the largest e."""
    tl.store(out + STAT_E, sum_all(e))
    tl.store(out + STAT_DD, sum_all(dd))
    if NORMS:
        tl.store(out + STAT_BB, sum_all(bb))
        tl.store(out + STAT_BD, sum_all(bd))
    tl.store(out + STAT_TOP, tl.max(tl.ravel(e), axis=0))


@triton.jit
def bound(dd, inv_tau):
    """No abs(d) / tau is larger: d^2 is in one of the sums `dd`."""
    return tl.sqrt(tl.max(tl.ravel(dd), axis=0)) * inv_tau


@triton.jit
def load_start(starts_ptr, slot):
    start = starts_ptr + slot * START_FIELDS
    return (tl.load(start + START_CARRY), tl.load(start + START_SHIFT), tl.load(start + START_R),
            tl.load(start + START_GROWTH), tl.load(start + START_FAR))


@triton.jit
def step(b, d, mask, start, inv_tau, sums, FULL: tl.constexpr, EXTRA: tl.constexpr, EXACT: tl.constexpr):
    """The changes (P_T - P_B) Z_T of rows of 8 neighbours, summed along each, and what they add to `sums`."""
    _, shift, r, growth, _ = start
    e = tl.exp2(tl.fma(b, inv_tau * LOG2E, -shift))
    if not FULL:
        e = tl.where(mask, e, 0.0)
    m = expm1_less(d, r, inv_tau, EXACT)
    change = e * m
    if EXTRA:
        first, second, third, aa, ac, cc = sums
        if EXACT:
            kl, js = exact_divergences(e, m * growth)
            first, second = add(first, kl), add(second, js)
        else:
            square = m * m
            weighted = e * square
            first = add(first, weighted)
            second, third = add_products(second, weighted, m), add_products(third, weighted, square)
        aa, ac, cc = add_products(aa, e, e), add_products(ac, e, change), add_products(cc, change, change)
        sums = (first, second, third, aa, ac, cc)
    return tl.cumsum(change, axis=1), sums


@triton.jit
def lengths(inside, before, counted, FULL: tl.constexpr):
    """Of each row, the sum of abs(CDF difference), which is `before` ahead of the row."""
    steps = tl.abs(inside + before[:, None])
    if not FULL:
        steps = tl.where(counted, steps, 0.0)
    return tl.sum(steps, axis=1)


@triton.jit
def store_scan(out, steps, sums, growth, EXTRA: tl.constexpr, EXACT: tl.constexpr):
    tl.store(out + SCAN_STEPS, sum_all(steps))
    if EXTRA:
        first, second, third, aa, ac, cc = sums
        kl, js = sum_all(first), sum_all(second)
        if not EXACT:
            kl, js = divergences(kl, js, sum_all(third), growth)
        tl.store(out + SCAN_KL, kl)
        tl.store(out + SCAN_JS, js)
        tl.store(out + SCAN_AA, sum_all(aa))
        tl.store(out + SCAN_AC, sum_all(ac))
        tl.store(out + SCAN_CC, sum_all(cc))
