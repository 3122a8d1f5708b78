"""Helpers on values in registers, shared by the kernels."""

import triton
import triton.language as tl

# -- optimizer: AdamW arithmetic, master weights, rounding -----------------------------------

FINITE = tl.constexpr(3.4028234663852886e38)  # the largest float32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to whole numbers


@triton.jit
def adamw_step(p, g, m, v, v_max, decay, weight1, beta2, weight2, inv_root2, eps, step_size, AMSGRAD: tl.constexpr):
    """One AdamW step in float32, each operation rounded; weight = 1 - beta, inv_root2 = 1 / sqrt(c2).

    The order is torch's single-tensor path, but that sqrt(v) is multiplied by 1 / sqrt(c2) where
    torch divides by sqrt(c2): one rounding more, at most 1 ulp of the update.
    """
    p = p * decay
    # torch's lerp: from the nearer end, so that beta1 = 0 gives g itself
    m = tl.where(weight1 < 0.5, m + weight1 * (g - m), g - (g - m) * (1.0 - weight1))
    v = v * beta2 + weight2 * g * g
    if AMSGRAD:  # a NaN stays one, as in torch.maximum
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
        root = tl.sqrt_rn(v_max)
    else:
        root = tl.sqrt_rn(v)
    p = p - step_size * tl.div_rn(m, root * inv_root2 + eps)
    return p, m, v, v_max


@triton.jit
def join_bf16(p, low):
    """The float32 of which `p` (bfloat16) holds the upper and `low` (int16) the lower bits."""
    high = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_bf16(x):
    """float32 -> (bfloat16, int16) with rounding half up: a bijection of all but NaNs, which become one."""
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def unit_fp16(p):
    """1/65536 of the distance between float16 numbers at `p`, a float16 number held in float32."""
    power = (p.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^floor(log2 |p|)
    unit = tl.maximum(power * 1.4901161193847656e-08, 9.094947017729282e-13)  # 2^-26; at least 2^-40
    return tl.where(tl.abs(p) <= FINITE, unit, 1.0)


@triton.jit
def join_fp16(p, low):
    """The float32 that `p` (float16) and `low` (int16, in 65536ths of p's spacing) stand for."""
    wide = p.to(tl.float32)
    return wide + low.to(tl.float32) * unit_fp16(wide)


@triton.jit
def split_fp16(x):
    """float32 -> (float16, int16): exact from 2^-17 to the largest float16, below that to 2^-40."""
    p = x.to(tl.float16)
    wide = p.to(tl.float32)
    rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) / unit_fp16(wide)  # by a power of two: exact
    whole = (rest + ROUND) - ROUND
    return p, tl.minimum(tl.maximum(whole, -32768.0), 32767.0).to(tl.int32).to(tl.int16)


@triton.jit
def round_stochastically(x, noise, DTYPE: tl.constexpr):
    """float32 -> a neighbour in bfloat16 or float16, the nearer one the likelier; `noise` in 0..65535."""
    raw = x.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:
        moved = ((raw + noise) & -0x10000).to(tl.float32, bitcast=True)
    else:
        normal = ((raw + (noise & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
        steps = tl.floor(tl.abs(x) * 16777216.0 + (noise & 0x1FFF).to(tl.float32) * 0.0001220703125)  # of 2^-24
        tiny = steps * 5.960464477539063e-08
        moved = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(raw < 0, -tiny, tiny), normal)
    return tl.where(tl.abs(x) <= FINITE, moved, x).to(DTYPE)


@triton.jit
def random16(place, lane, seed, step, stream, BY_EIGHT: tl.constexpr):
    """16 random bits, int32, for each state element place + lane.

    Philox 4x32-10 with counter (i // 8, step, stream): element i takes half i % 2 of word
    (i % 8) // 2. BY_EIGHT: `place` are multiples of 8, [n, 1], and `lane` is 0..7, [1, 8]: one
    call serves 8 elements. Otherwise `place` are the elements themselves and `lane` is 0.
    """
    w0, w1, w2, w3 = _philox(place >> 3, seed, step, stream)
    which = (lane if BY_EIGHT else place & 7).to(tl.int32)
    word = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
    return tl.where(which % 2 == 1, word >> 16, word & 0xFFFF).to(tl.int32)


@triton.jit
def _philox(group, seed, step, stream):
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, (group >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero + stream.to(tl.uint32))


# -- optimizer: moments in 8 bits ------------------------------------------------------------


@triton.jit
def decode8(codes, scale):
    """Codes (int8 or uint8) and the scale of their 64 -> float32: sign(code) (|code| scale)^4."""
    code = codes.to(tl.float32)
    root = code * scale
    square = root * root
    return tl.where(code < 0, -(square * square), square * square)


@triton.jit
def encode8(x):
    """float32 [n, 8] -> codes -127..127 (int32), and scales [n, 1]: fourth roots, to nearest."""
    root = tl.sqrt(tl.sqrt(tl.abs(x)))
    scale = _largest_of_64(root, 127.0)
    code = tl.minimum((root * (1.0 / tl.maximum(scale, 1e-30)) + ROUND) - ROUND, 127.0)
    return tl.where(x < 0, -code, code).to(tl.int32), scale


@triton.jit
def encode8_stochastically(x, noise):
    """float32 [n, 8] >= 0 -> codes 0..255 (int32), 0 for 0 alone, and scales [n, 1].

    To one of two neighbours, the nearer one the likelier, so that the mean of what is decoded is
    x; `noise` in 0..65535.
    """
    root = tl.sqrt(tl.sqrt(x))
    scale = _largest_of_64(root, 255.0)
    code = tl.minimum(tl.floor(root * (1.0 / tl.maximum(scale, 1e-30))), 254.0)
    low = code * scale
    low = low * low * (low * low)
    high = (code + 1.0) * scale
    high = high * high * (high * high)
    code += tl.where((x - low) * 65536.0 > noise.to(tl.float32) * (high - low), 1.0, 0.0)
    return tl.where(x > 0, tl.maximum(code, 1.0), 0.0).to(tl.int32), scale


@triton.jit
def _largest_of_64(root, CODES: tl.constexpr):
    """root [n, 8] -> the largest of 8 rows (64 elements) / CODES, for each row, [n, 1]; Inf where one is NaN."""
    most = tl.max(tl.where(root != root, float("inf"), root), 1)  # [n]
    n: tl.constexpr = most.shape[0]
    most = tl.max(tl.reshape(most, [n // 8, 8]), 1, keep_dims=True)  # [n // 8, 1]
    return tl.reshape(tl.broadcast_to(most, [n // 8, 8]), [n, 1]) / CODES


# -- scoring: small differences of exponentials ----------------------------------------------

TAYLOR = tl.constexpr(0.015625)  # the short series below hold up to it
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1_less(d, r, inv_tau, EXACT: tl.constexpr):
    """exp(d inv_tau) - 1 - r in float32 without cancellation, to 3e-7 of the larger of both.

    Not EXACT, abs(d inv_tau) must be at most TAYLOR: x + c x^2 + x^3 / 6, where c - 1/2 is what x^4 / 24
    has of x^2 there (its Chebyshev polynomial), to 4e-8 relative.
    """
    if not EXACT:
        square, cube = inv_tau * inv_tau * 0.50000763, inv_tau * inv_tau * inv_tau * 0.16666667
        return tl.fma(d, tl.fma(d, tl.fma(d, cube, square), inv_tau), -r)
    x = d * inv_tau
    series = 2.7557319e-6 + x * 2.7557319e-7
    series = 1.9841270e-4 + x * (2.4801587e-5 + x * series)
    series = 8.3333333e-3 + x * (1.3888889e-3 + x * series)
    series = 0.16666667 + x * (4.1666668e-2 + x * series)
    series = x * (1.0 + x * (0.5 + x * series))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0) - r


@triton.jit
def divergences(m2, m3, m4, growth):
    """KL and Jensen-Shannon from the sums of p m^2, p m^3 and p m^4 where d = m growth is at most TAYLOR.

    Their series' fifth powers go into the third as what d^3 has of d there: to 2e-7 relative.
    """
    m3, m4 = m3 * growth, m4 * growth * growth
    kl = tl.fma(m4, 0.083333333, tl.fma(m3, -0.16667582, m2 * 0.5))
    js = tl.fma(m4, 0.036458333, tl.fma(m3, -0.062504292, m2 * 0.125))
    return kl * growth * growth, js * growth * growth


@triton.jit
def exact_divergences(p, d):
    """The terms of KL and Jensen-Shannon between p and (1 + d) p."""
    whole = surprise(d)
    return p * whole, p * (0.5 * whole - surprise(0.5 * d))


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
    return tl.where(tl.abs(d) < 0.25, small, one * tl.log(one) - d)
