"""Moments in 8 bits: codes of the fourth root, and a float32 scale for each 64 elements.

Tiles have the shape [A, N, B, L], in which x[:, n] are the 64 elements of scale n; scales are
[1, N, 1, 1]. Which code a number gets is decided by products, which round as IEEE says: an approximate
root only proposes a neighbour, and whatever its last digits, the code is the same. So codes are those
of `alps_kernels.ops.adamw.quantize8`, bit for bit.
"""

import triton
import triton.language as tl

from .rounding import ROUND, raw

WHOLE = tl.constexpr(8388608.0)  # 2^23: the lowest bits of WHOLE + c are those of c, a whole number


@triton.jit
def decode8(codes, scale):
    """Codes (int8 or uint8) and the scale of their 64 -> float32: sign(code) (|code| scale)^4."""
    root = codes.to(tl.float32) * scale
    square = root * root
    return (raw(square * square) | (raw(root) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def encode8(x, A: tl.constexpr):
    """float32 -> codes -127..127 (int8), to nearest, and scales."""
    size = tl.abs(x)
    scale = _scale(size, 127.0, A)
    root, unit = _root(size, scale)
    low = tl.maximum(tl.fma(root, unit, -0.5), 0.0) + WHOLE  # a NaN becomes code 0
    low += (size > _fourth_power(low - (WHOLE - 0.5), scale)).to(tl.float32)
    return tl.where(x < 0, -raw(low), raw(low)).to(tl.int8), scale


@triton.jit
def encode8_stochastically(x, noise, A: tl.constexpr):
    """float32 >= 0 -> codes 0..255 (uint8), 0 for 0 alone, and scales.

    To one of two neighbours, the nearer one the likelier, so that the mean of what is decoded is
    x; `noise` in 0..65535.
    """
    scale = _scale(x, 255.0, A)
    root, unit = _root(x, scale)
    near = tl.minimum(tl.fma(root, unit, ROUND) - ROUND, 254.0)
    this = _fourth_power(near, scale)
    step = tl.where(x < this, -1.0, 1.0)  # to the neighbour on the side of x
    that = _fourth_power(near + step, scale)
    up = (x - tl.minimum(this, that)) * 65536.0 > noise.to(tl.float32) * tl.abs(that - this)
    code = tl.maximum(tl.minimum(near, near + step) + up.to(tl.float32), (x > 0).to(tl.float32))
    return raw(code + WHOLE).to(tl.uint8), scale


@triton.jit
def _fourth_power(code, scale):
    root = code * scale
    square = root * root
    return square * square


@triton.jit
def _root(x, scale):
    """(root, unit): root * unit is about the fourth root of x >= 0 in units of the scale, off by far less than a half.

    An inverse square root takes no number below 2^-126: where the scale is that small, x is lifted.
    """
    tiny = scale < 1e-7
    root = tl.rsqrt(tl.rsqrt(x * tl.where(tiny, 7.922816251426434e28, 1.0)))  # 2^96
    return root, tl.where(tiny, 5.960464477539063e-08, 1.0) / tl.maximum(scale, 1e-30)  # 2^-24


@triton.jit
def _scale(x, CODES: tl.constexpr, A: tl.constexpr):
    """x >= 0 -> the fourth root of the largest of each 64, / CODES, [G, 1]; Inf where one is NaN."""
    G: tl.constexpr = x.shape[0]
    N: tl.constexpr = G * x.shape[1] // 64
    most = tl.reshape(tl.max(raw(x) & 0x7FFFFFFF, 1), [A, N, G // (A * N)])  # the bits of a NaN are the largest of all
    most = tl.max(tl.max(most, 2, keep_dims=True), 0, keep_dims=True)  # [1, N, 1]
    most = tl.minimum(most, 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.sqrt_rn(tl.sqrt_rn(most)), CODES)
    return tl.reshape(tl.broadcast_to(scale, [A, N, G // (A * N)]), [G, 1])
