"""Sums over tiles of a base and a task model, for both passes of `head_delta`.

A pair of weights b, t has d = t - b, e = exp(b / tau) and u = expm1(d / tau). Tensors are [lanes, 8]: a lane forms the
prefix sums of its neighbours alone. A program that takes RUNS tiles side by side has equally many lanes for each, one
tile after the other; what it has of tiles is [RUNS], or a scalar if it takes one. Sums stay in the lanes until the end:
one tree of shuffles then serves a whole tile.
"""

import triton
import triton.language as tl

from .series import LOG2E, exact_divergences, expm1_less

STAT_FIELDS = tl.constexpr(18)  # of a row of `stats`, whose columns are listed in `store_stats`


@triton.jit
def sum_lanes(x, RUNS: tl.constexpr):
    """Of [lanes] the sum of each tile."""
    return tl.sum(x, axis=0) if RUNS == 1 else tl.sum(tl.reshape(x, (RUNS, x.shape[0] // RUNS)), axis=1)


@triton.jit
def max_lanes(x, RUNS: tl.constexpr):
    return tl.max(x, axis=0) if RUNS == 1 else tl.max(tl.reshape(x, (RUNS, x.shape[0] // RUNS)), axis=1)


@triton.jit
def each(RUNS: tl.constexpr):
    """The numbers of the tiles."""
    return 0 if RUNS == 1 else tl.arange(0, RUNS)


@triton.jit
def lanes(LANES: tl.constexpr, RUNS: tl.constexpr):
    """The number of each lane among those of its tile."""
    return tl.arange(0, LANES) % (LANES // RUNS)


@triton.jit
def largest(x, RUNS: tl.constexpr):
    return x if RUNS == 1 else tl.max(x, axis=0)


@triton.jit
def to_lanes(x, LANES: tl.constexpr, RUNS: tl.constexpr):
    """What each lane has of its tile's x, [lanes]."""
    return x if RUNS == 1 else tl.reshape(tl.broadcast_to(x[:, None], (RUNS, LANES // RUNS)), (LANES,))


@triton.jit
def _ahead(x, RUNS: tl.constexpr):
    """Sums over the lanes of a tile ahead of each, [lanes]."""
    if RUNS == 1:
        return tl.cumsum(x, axis=0) - x
    else:
        return tl.reshape(tl.cumsum(tl.reshape(x, (RUNS, x.shape[0] // RUNS)), axis=1), x.shape) - x


@triton.jit
def _halves(x):
    """Every other element of [lanes, 2 n]: two [lanes, n]."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def first_and_second(x, N: tl.constexpr = 8):
    """Of each 2 N neighbours of [runs, 2 N n] the first and the second N, [runs n, N]."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0] * x.shape[1] // (2 * N), 2, N)), (0, 2, 1)))


@triton.jit
def _neighbours(x):
    """[lanes, n] as n tensors [lanes]."""
    if x.shape[1] == 1:
        return (tl.reshape(x, (x.shape[0],)),)
    else:
        left, right = first_and_second(x, x.shape[1] // 2)
        return _neighbours(left) + _neighbours(right)


@triton.jit
def _prefix_sums(x):
    """Of [lanes, 8], along a lane: 8 tensors [lanes]. (Of tl.cumsum threads that hold products would change places.)"""
    each = _neighbours(x)
    sums = (each[0],)
    for i in tl.static_range(1, 8):
        sums = sums + (sums[i - 1] + each[i],)
    return sums


@triton.jit
def exp_of(b, there, inv_tau, MASKED: tl.constexpr):
    """e; if MASKED, zero where not `there`."""
    e = tl.exp2(b * (inv_tau * LOG2E))
    return tl.where(there, e, 0.0) if MASKED else e


@triton.jit
def zeros(N: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """N sums before anything is added, [LANES, WIDTH]; [LANES] if WIDTH is 0."""
    none, sums = tl.zeros((LANES, WIDTH), tl.float32) if WIDTH else tl.zeros((LANES,), tl.float32), ()
    for _ in tl.static_range(N):
        sums = sums + (none,)
    return sums


@triton.jit
def add_each(sums, more):
    added = ()
    for i in tl.static_range(len(sums)):
        added = added + (sums[i] + more[i],)
    return added


@triton.jit
def _add_products(sums, x, y):
    """sums + x y, of neighbours together down to as many as `sums` has."""
    if x.shape[1] == sums.shape[1]:
        return tl.fma(x, y, sums)
    else:
        x0, x1 = _halves(x)
        y0, y1 = _halves(y)
        return _add_products(_add_products(sums, x0, y0), x1, y1)


@triton.jit
def _weigh(eight, inv_tau, sums, MASKED: tl.constexpr, ALL: tl.constexpr, EXACT: tl.constexpr):
    """Of the prefix sums E_i of e and A_i of e u: the last ones, their sums, the largest abs(A_i); and new `sums`."""
    b, d, there = eight
    e, u = exp_of(b, there, inv_tau, MASKED), expm1_less(d, 0.0, inv_tau, EXACT)
    a = e * u
    left, right, added = (), (), ()
    if ALL:
        left, right = (b, b, a, a * u, a * u, e, e, a), (b, d, u, u, u * u, e, a, a)
    for i in tl.static_range(len(sums)):
        added = added + (_add_products(sums[i], left[i], right[i]),)
    e, a = _prefix_sums(e), _prefix_sums(a)
    e_line, a_line, most = e[0], a[0], tl.abs(a[0])
    for i in tl.static_range(1, 8):
        e_line, a_line, most = e_line + e[i], a_line + a[i], tl.maximum(most, tl.abs(a[i]))
    return e[7], a[7], e_line, a_line, most, added


@triton.jit
def add_squares(squares, left, right):
    """squares + d^2 of 16 neighbours of each lane, of neighbours together down to as many as `squares` has."""
    return _add_products(_add_products(squares, left[1], left[1]), right[1], right[1])


@triton.jit
def farthest(squares, inv_tau, RUNS: tl.constexpr):
    """A bound of abs(d) / tau of each tile."""
    return tl.sqrt(max_lanes(tl.max(squares, axis=1), RUNS)) * inv_tau


@triton.jit
def weigh(left, right, behind, inv_tau, sums, MASKED: tl.constexpr, ALL: tl.constexpr, EXACT: tl.constexpr):
    """Pass A, 16 neighbours of each lane: what `store_stats` needs of them, and `sums` with theirs added.

    Unless EXACT, every change is taken for a small one. `left` and `right` are b, d and what is there, [lanes, 8],
    zeros where MASKED and not there: that comes behind what is. So many elements of the tile are `behind` the 16.
    """
    e0, a0, e_line0, a_line0, most0, sums = _weigh(left, inv_tau, sums, MASKED, ALL, EXACT)
    e1, a1, e_line1, a_line1, most1, sums = _weigh(right, inv_tau, sums, MASKED, ALL, EXACT)
    e, a, n = e0 + e1, a0 + a1, behind.to(tl.float32)
    e_line = tl.fma(e, n, tl.fma(e0, 8.0, e_line0 + e_line1))
    a_line = tl.fma(a, n, tl.fma(a0, 8.0, a_line0 + a_line1))
    return (e, a, e_line, a_line, tl.maximum(most0, tl.abs(a0) + most1)), sums


@triton.jit
def _in_two(x, RUNS: tl.constexpr):
    """Sums over lanes, to float64's precision: in two float32."""
    total = sum_lanes(x.to(tl.float64), RUNS)
    return total.to(tl.float32), (total - total.to(tl.float32)).to(tl.float32)


@triton.jit
def store_stats(out, stored, pieces, squares, sums, inv_tau, RUNS: tl.constexpr):
    """Write the rows of `stats` that are `stored`, from pieces in their order; returns their `far`.

        e, its rest, moved, its rest: sums of e and of e u, the last E_n and A_n of the prefix sums E_i and A_i
        sums of E_i and of A_i; a bound of abs(A_i - E_i A_n / E_n); bounds of e and (`far`) of abs(d) / tau, both
        from partial sums; sums of d^2, and for ALL metrics of b^2, b d, e u^2, e u^3, e u^4, e^2, e^2 u, e^2 u^2
    """
    total, top = pieces[0], pieces[0][0]
    for i in tl.static_range(1, len(pieces)):
        total, top = add_each(total, pieces[i]), tl.maximum(top, pieces[i][0])
    e_n, e_rest = _in_two(total[0], RUNS)
    a_n, a_rest = _in_two(total[1], RUNS)
    slope = to_lanes(a_n / tl.maximum(e_n, 1e-37), top.shape[0], RUNS)
    before, bridge = e_n * 0.0, tl.zeros_like(top)
    for i in tl.static_range(len(pieces)):
        e, a, _, _, most = pieces[i]
        x = tl.fma(-slope, e, a)
        ahead = to_lanes(before, top.shape[0], RUNS) + _ahead(x, RUNS)
        bridge = tl.maximum(bridge, tl.fma(tl.abs(slope), e, tl.abs(ahead) + most))
        before += sum_lanes(x, RUNS)
    far, sums = farthest(squares, inv_tau, RUNS), (squares,) + sums
    row = (e_n, e_rest, a_n, a_rest, sum_lanes(total[2], RUNS), sum_lanes(total[3], RUNS), max_lanes(bridge, RUNS),
           max_lanes(top, RUNS), far)
    for i in tl.static_range(len(sums)):
        row = row + (sum_lanes(tl.sum(sums[i], axis=1), RUNS),)
    for i in tl.static_range(len(row)):
        tl.store(out + i, row[i], mask=stored)
    return far


@triton.jit
def _change(eight, r, inv_tau, sums, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Prefix sums of c = e (u - r) = (P_T - P_B) Z_T of 8 neighbours; if EXACT, all `sums` but the first, the steps."""
    b, d, there = eight
    e, m = exp_of(b, there, inv_tau, MASKED), expm1_less(d, r, inv_tau, EXACT)
    c = e * m
    if EXACT:
        # fma: else the product is fused into tl.sum, and the threads that hold a sum round it differently
        squares = tl.fma(e, e, 0.0), tl.fma(e, c, 0.0), tl.fma(c, c, 0.0)
        terms, added = exact_divergences(e, m / (1.0 + r)) + squares, (sums[0],)
        for i in tl.static_range(5):
            added = added + (sums[i + 1] + tl.sum(terms[i], axis=1),)
        return _prefix_sums(c), added
    else:
        return _prefix_sums(c), sums


@triton.jit
def _steps(inside, before, there, MASKED: tl.constexpr):
    steps, is_there = tl.zeros_like(before), _neighbours(there) if MASKED else ()
    for i in tl.static_range(8):
        step = tl.abs(inside[i] + before)
        steps += tl.where(is_there[i], step, 0.0) if MASKED else step
    return steps


@triton.jit
def scan(left, right, carry, r, inv_tau, sums, RUNS: tl.constexpr, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """Pass B, 16 neighbours of each lane: the CDF difference behind all of them, and `sums` with theirs added.

    `sums`, in lanes: abs(CDF difference); if EXACT also the terms of KL and JS, e^2, e c and c^2.
    """
    c0, sums = _change(left, r, inv_tau, sums, MASKED, EXACT)
    c1, sums = _change(right, r, inv_tau, sums, MASKED, EXACT)
    half = c0[7]
    whole = half + c1[7]
    before = to_lanes(carry, whole.shape[0], RUNS) + _ahead(whole, RUNS)
    new = (sums[0] + (_steps(c0, before, left[2], MASKED) + _steps(c1, before + half, right[2], MASKED)),)
    for i in tl.static_range(1, len(sums)):
        new = new + (sums[i],)
    return carry + sum_lanes(whole, RUNS), new


@triton.jit
def scanned(sums, counted):
    """Float64 sums of all lanes: six, zeros for those that are not there; those behind the first where `counted`."""
    total = ()
    for i in tl.static_range(6):
        if i < len(sums):
            x = sums[i] if i == 0 else tl.where(counted, sums[i], 0.0)
            total = total + (tl.sum(x, axis=0).to(tl.float64),)
        else:
            total = total + (tl.full((), 0.0, tl.float64),)
    return total
