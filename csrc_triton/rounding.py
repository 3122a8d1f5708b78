"""16-bit weights and moments: master weights, stochastic rounding, random bits."""

import triton
import triton.language as tl

FINITE = tl.constexpr(3.4028234663852886e38)  # the largest float32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: ROUND + x is rounded to a whole number, which its lowest 16 bits hold
PARAM_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = map(tl.constexpr, range(3))  # what random bits round: added to the stream


@triton.jit
def raw(x):
    """The bits of float32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def join_bf16(p, low):
    """The float32 of which `p` (bfloat16) holds the upper and `low` (int16) the lower bits."""
    high = p.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_bf16(x):
    """float32 -> (bfloat16, int16) with rounding half up: a bijection of all but NaNs, which become one."""
    bits = tl.where(x != x, 0x7FC00000, raw(x))
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def unit_fp16(p):
    """1/65536 of the distance between float16 numbers at `p`, a float16 number held in float32."""
    power = (raw(p) & 0x7F800000).to(tl.float32, bitcast=True)  # 2^floor(log2 |p|)
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
    inverse = (0x7F000000 - raw(unit_fp16(wide))).to(tl.float32, bitcast=True)  # of a power of two: exact
    rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) * inverse
    return p, raw(tl.minimum(tl.maximum(rest, -32768.0), 32767.0) + ROUND).to(tl.int16)


@triton.jit
def join(p, low, MASTER: tl.constexpr):
    """The float32 weights that param and its low part stand for."""
    if MASTER == "split":
        return join_bf16(p, low) if p.dtype == tl.bfloat16 else join_fp16(p, low)
    if MASTER == "kahan":
        return p.to(tl.float32) + low.to(tl.float32)
    return p.to(tl.float32)


@triton.jit
def split(master, PARAM: tl.constexpr, MASTER: tl.constexpr):
    """float32 weights -> the param that stands for them and its low part; without one, param twice."""
    if MASTER == "split":
        p, low = split_bf16(master) if PARAM == tl.bfloat16 else split_fp16(master)
    else:
        p = master.to(PARAM)
        low = p
        if MASTER == "kahan":
            wide = p.to(tl.float32)
            low = tl.where(tl.abs(wide) <= FINITE, master - wide, 0.0).to(PARAM)
    return p, low


@triton.jit
def round_stochastically(x, noise, DTYPE: tl.constexpr):
    """float32 -> a neighbour in bfloat16 or float16, the nearer one the likelier; `noise` in 0..65535."""
    bits = raw(x)
    if DTYPE == tl.bfloat16:
        moved = ((bits + noise) & -0x10000).to(tl.float32, bitcast=True)
    else:
        normal = ((bits + (noise & 0x1FFF)) & -0x2000).to(tl.float32, bitcast=True)
        steps = tl.floor(tl.abs(x) * 16777216.0 + (noise & 0x1FFF).to(tl.float32) * 0.0001220703125)  # of 2^-24
        tiny = steps * 5.960464477539063e-08
        moved = tl.where(tl.abs(x) < 6.103515625e-05, tl.where(bits < 0, -tiny, tiny), normal)
    return tl.where(tl.abs(x) <= FINITE, moved, x).to(DTYPE)


@triton.jit
def random16(place, lane, seed, step, stream):
    """16 random bits, int32, for each state element place + lane.

    Philox 4x32-10 with counter (i // 8, step, stream): element i takes half i % 2 of word
    (i % 8) // 2. `lane` is 0..L-1, [1, L], and places are multiples of L, 1, 4 or 8: one call serves L elements.
    """
    w0, w1, w2, w3 = _philox(place >> 3, seed, step, stream)
    which = (place.to(tl.int32) & (8 - lane.shape[1])) + lane
    word = tl.where((which & 4) == 0, tl.where((which & 2) == 0, w0, w1), tl.where((which & 2) == 0, w2, w3))
    return tl.where((which & 1) == 0, word & 0xFFFF, word >> 16).to(tl.int32)


@triton.jit
def _philox(group, seed, step, stream):
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, (group >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero + stream.to(tl.uint32))
