"""Moments in 8 bits: codes of the fourth root, and a float32 scale for each 64 elements."""

import triton
import triton.language as tl

from .rounding import ROUND


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
