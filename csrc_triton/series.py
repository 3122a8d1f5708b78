"""Small differences of exponentials, and the divergences of distributions that differ little."""

import triton
import triton.language as tl

TAYLOR = tl.constexpr(0.015625)  # the short series below hold up to it
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1_less(d, r, inv_tau, EXACT: tl.constexpr):
    """exp(d inv_tau) - 1 - r in float32 without cancellation, to 3e-7 of the larger of both.

    Not EXACT, abs(d inv_tau) must be at most TAYLOR: x + x^2 / 2 + x^3 / 6, too small by x^4 / 24. Coefficients that
    make the largest error smaller make that of small x larger: all of one sign, it adds up over a head.
    """
    if not EXACT:
        square, cube = inv_tau * inv_tau * 0.5, inv_tau * inv_tau * inv_tau * 0.16666667
        return tl.fma(d, tl.fma(d, tl.fma(d, cube, square), inv_tau), -r)
    x = d * inv_tau
    series = 2.7557319e-6 + x * 2.7557319e-7
    series = 1.9841270e-4 + x * (2.4801587e-5 + x * series)
    series = 8.3333333e-3 + x * (1.3888889e-3 + x * series)
    series = 0.16666667 + x * (4.1666668e-2 + x * series)
    series = tl.fma(x * x, 0.5 + x * series, x)
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0) - r


@triton.jit
def divergences(m2, m3, m4, growth):
    """KL and Jensen-Shannon from float64 sums of p m^2, p m^3 and p m^4 where d = m growth is at most TAYLOR.

    Their series' fifth powers go into the third as what d^3 has of d there: to 2e-7 relative.
    """
    m3, m4 = m3 * growth, m4 * growth * growth
    kl = m2 * 0.5 - m3 * 0.16667582 + m4 * 0.083333333
    js = m2 * 0.125 - m3 * 0.062504292 + m4 * 0.036458333
    return kl * growth * growth, js * growth * growth


@triton.jit
def exact_divergences(p, d):
    """The terms of KL and Jensen-Shannon between p and (1 + d) p, each rounded ahead of any sum."""
    whole = surprise(d)
    return tl.fma(p, whole, 0.0), tl.fma(p, 0.5 * whole - surprise(0.5 * d), 0.0)


@triton.jit
def surprise(d):
    """(1 + d) log(1 + d) - d for d > -1: the series d^2/2 - d^3/6 + ... where the form cancels."""
    s = 0.0064102564 - d * 0.0054945055
    s = 0.0090909091 - d * (0.0075757576 - d * s)
    s = 0.013888889 - d * (0.011111111 - d * s)
    s = 0.023809524 - d * (0.017857143 - d * s)
    s = 0.05 - d * (0.033333333 - d * s)
    s = 0.16666667 - d * (0.083333333 - d * s)
    small = d * d * (0.5 - d * s)
    one = tl.maximum(1.0 + d, 1e-37)
    root = 1.0 + tl.sqrt(one)
    t = d / (root * root)  # log(1 + d) = 4 atanh(t); tl.log is approximate, which the difference would show
    q = t * t
    log = t * (4.0 + q * (1.3333334 + q * (0.8 + q * (0.5714286 + q * (0.44444445 + q * 0.36363637)))))
    return tl.where(tl.abs(d) < 0.25, small, one * log - d)
