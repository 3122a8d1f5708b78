"""The sliced AdamW step and the sliced gradient norm."""

import triton
import triton.language as tl

from .quantize8 import decode8, encode8, encode8_stochastically
from .rounding import EXP_AVG_BITS, EXP_AVG_SQ_BITS, PARAM_BITS, join, random16, round_stochastically, split

# Columns of the tables; the rows `Tile`, `Pointers` and `HyperRow` of `alps_kernels/ops/adamw` have the same order.
# Work list, int64, one row for each tile:
(TILE_PARAM, TILE_HYPER, TILE_P_OFF, TILE_G_OFF, TILE_S_OFF, TILE_P_STRIDE, TILE_G_STRIDE, TILE_S_STRIDE, TILE_FIRST,
 TILE_WIDTH, TILE_LIMIT, TILE_SCALE, TILE_COPY_OFF, TILE_COPY_STRIDE, TILE_FIELDS) = map(tl.constexpr, range(15))
# Addresses, int64, one row for each parameter:
(POINTER_PARAM, POINTER_GRAD, POINTER_EXP_AVG, POINTER_EXP_AVG_SQ, POINTER_MAX_EXP_AVG_SQ, POINTER_LOW,
 POINTER_EXP_AVG_SCALE, POINTER_EXP_AVG_SQ_SCALE, POINTER_WEIGHT_COPY, POINTER_HYPER, POINTER_STREAM, POINTER_SEED,
 POINTER_FIELDS) = map(tl.constexpr, range(13))
# Hyperparameters of one step, float32:
(HYPER_DECAY, HYPER_WEIGHT1, HYPER_BETA2, HYPER_WEIGHT2, HYPER_INV_ROOT2, HYPER_EPS, HYPER_STEP_SIZE, HYPER_SIGN,
 HYPER_STEP, HYPER_FIELDS) = map(tl.constexpr, range(10))


@triton.jit
def adamw_step(p, g, m, v, v_max, decay, weight1, beta2, weight2, inv_root2, eps, step_size,
               AMSGRAD: tl.constexpr, EXACT: tl.constexpr):
    """One AdamW step in float32, each operation rounded; weight = 1 - beta, inv_root2 = 1 / sqrt(c2).

    The order is torch's single-tensor path, but that sqrt(v) is multiplied by 1 / sqrt(c2) where
    torch divides by sqrt(c2): one rounding more, at most 1 ulp of the update. Without EXACT root and
    quotient are the GPU's approximate ones: at most 3 ulp of the update more.
    """
    p = p * decay
    # torch's lerp: from the nearer end, so that beta1 = 0 gives g itself
    near = weight1 < 0.5
    m = tl.where(near, m, g) + tl.where(near, weight1, weight1 - 1.0) * (g - m)
    v = v * beta2 + weight2 * g * g
    if AMSGRAD:  # a NaN stays one, as in torch.maximum
        v_max = tl.where((v > v_max) | (v != v), v, v_max)
    most = v_max if AMSGRAD else v
    if EXACT:
        p = p - step_size * tl.div_rn(m, tl.sqrt_rn(most) * inv_root2 + eps)
    else:
        inverse = tl.rsqrt(tl.sqrt(most) * inv_root2 + eps)
        p = p - step_size * (m * (inverse * inverse))
    return p, m, v, v_max


@triton.jit
def _field(row, index: tl.constexpr, ALIGNED: tl.constexpr):
    """A length or offset of the work list; ALIGNED: it is a multiple of 8."""
    value = tl.load(row + index)
    if ALIGNED:
        value = tl.multiple_of(value, 8)
    return value


@triton.jit
def _pointer(row, index: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + index).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _places(tile, moves, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, A: tl.constexpr, L: tl.constexpr):
    """(row, column, lane, mask, 64) of the tile's elements in its rectangle, as [G, L]; moves 0: of none.

    Vector (a N + n) B + b holds the L elements from 64 n + (a B + b) L on, with A B L = 64: neighbouring
    threads have neighbouring vectors, and B of them all of a 64. ALIGNED: a vector lies in one row.
    """
    first = _field(tile, TILE_FIRST, ALIGNED).to(tl.int32) // L
    width = _field(tile, TILE_WIDTH, ALIGNED).to(tl.int32) // L
    limit = _field(tile, TILE_LIMIT, ALIGNED).to(tl.int32) * moves
    B: tl.constexpr = 64 // (A * L)
    vector = tl.arange(0, GROUPS * 8 // L)[:, None]
    block = vector // B % (GROUPS // 8)
    count = block * (64 // L) + vector // (GROUPS * 8 // (A * L)) * B + vector % B
    lane = tl.arange(0, L)[None, :]
    row = (first + count) // width
    col = (first + count) % width * L
    return row.to(tl.int64), col.to(tl.int64), lane, count * L + lane < limit, block, limit


@triton.jit
def _grad_factor(norm, scale, max_norm):
    """What every gradient is multiplied by: 1 / grad_scale, and where norm > max_norm, max_norm / (norm + 1e-6)."""
    over = norm + 1e-6
    clipped = (max_norm >= over) == 0  # of a NaN, too: it stays one, as in torch.clamp
    return tl.div_rn(tl.where(clipped, max_norm, 1.0), tl.where(clipped, over, 1.0) * scale)


@triton.jit
def _load(ptr, other):
    """A number of float32, `other` where there is none."""
    return tl.load(ptr).to(tl.float32) if ptr is not None else other


@triton.jit
def head_adamw_kernel(
    tiles_ptr, pointers_ptr, hypers_ptr, norm_ptr, scale_ptr, found_inf_ptr, max_norm,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, AMSGRAD: tl.constexpr,
    WEIGHT_COPY: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):
    """One AdamW step on the selected slices of many weights, in place.

    Program w owns TILES tiles of the work list, 1 or 2, from tile w TILES on: each 8 GROUPS elements
    of one rectangle of one parameter, row after row. All that it reads is asked for before it computes.

        g <- g / grad_scale min(1, max_norm / (norm + 1e-6))
        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)

    Shapes     tiles int64 [n_tiles, 14]; pointers int64 [n_params, 12]; hypers float32 [n, 9];
               norm float64, grad_scale and found_inf float32: one number each, or None
    Dtypes     param, grad fp32/fp16/bf16; moments fp32, bf16, or 8-bit codes (MOMENT int8) with a
               float32 scale for each 64; low int16 (split) or param's (kahan); arithmetic fp32,
               every operation rounded; one rounding of each value, at its store
    Scalars    max_norm; all others in the tables: no step recompiles
    Untouched  elements outside the work list are neither read nor written; where found_inf is not
               zero, no element is
    Bytes      per element: 2 of param, grad once, 2 of each moment: 22 for bf16 weights with fp32
               moments, 26 with MASTER "split" or "kahan", 28 for fp32; 14.25 for bf16 "split" with
               8-bit moments; WEIGHT_COPY: one more of param; and 112 of work list for each tile
    """
    tl.static_assert(TILES == 1 or TILES == 2)
    # Four neighbours are 16 bytes of float32: a warp's request fills its sectors. Without float32 eight do.
    L: tl.constexpr = (4 if PARAM == tl.float32 or GRAD == tl.float32 or MOMENT == tl.float32 else 8) if ALIGNED else 1
    # Two vectors of a 64 in one thread halve what its scales cost; of float16, which takes more registers, one.
    A: tl.constexpr = 2 if MOMENT == tl.int8 and (PARAM != tl.float16 or not ALIGNED) else 1
    moves = 1
    if found_inf_ptr is not None:
        moves = (tl.load(found_inf_ptr) == 0.0).to(tl.int32)
    norm, scale = _load(norm_ptr, float("-inf")), _load(scale_ptr, 1.0)
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILES * TILE_FIELDS
    first = _load_tile(tile, pointers_ptr, hypers_ptr, moves, PARAM, GRAD, MOMENT, MASTER, AMSGRAD, WEIGHT_COPY,
                       ALIGNED, GROUPS, A, L)
    if TILES == 2:
        second = _load_tile(tile + TILE_FIELDS, pointers_ptr, hypers_ptr, moves, PARAM, GRAD, MOMENT, MASTER, AMSGRAD,
                            WEIGHT_COPY, ALIGNED, GROUPS, A, L)
    factor = _grad_factor(norm, scale, max_norm)  # after the loads: a division may branch, and none would pass it
    _step_tile(*first, factor, A, PARAM, MOMENT, MASTER, AMSGRAD, WEIGHT_COPY)
    if TILES == 2:
        _step_tile(*second, factor, A, PARAM, MOMENT, MASTER, AMSGRAD, WEIGHT_COPY)


@triton.jit
def _load_tile(
    tile, pointers_ptr, hypers_ptr, moves, PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    MASTER: tl.constexpr, AMSGRAD: tl.constexpr, WEIGHT_COPY: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
    A: tl.constexpr, L: tl.constexpr,
):
    """Addresses, values, masks, places of the random bits and hyperparameters of a tile: all that it reads.

    What a variant lacks is another tensor's.
    """
    pointers = pointers_ptr + tl.load(tile + TILE_PARAM) * POINTER_FIELDS
    hypers = hypers_ptr + (tl.load(pointers + POINTER_HYPER) + tl.load(tile + TILE_HYPER)) * HYPER_FIELDS
    row, col, lane, mask, block, limit = _places(tile, moves, ALIGNED, GROUPS, A, L)
    offs_p = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED) + col + lane
    offs_g = _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED) + col + lane
    place = _field(tile, TILE_S_OFF, ALIGNED) + row * _field(tile, TILE_S_STRIDE, ALIGNED) + col
    offs_s = place + lane

    p_ptrs = _pointer(pointers, POINTER_PARAM, PARAM, ALIGNED) + offs_p
    p = tl.load(p_ptrs, mask=mask, other=0.0)
    g = tl.load(_pointer(pointers, POINTER_GRAD, GRAD, ALIGNED) + offs_g, mask=mask, other=0.0)
    low_ptrs, low = p_ptrs, p
    if MASTER == "split" or MASTER == "kahan":
        low_ptrs = _pointer(pointers, POINTER_LOW, tl.int16 if MASTER == "split" else PARAM, ALIGNED) + offs_s
        low = tl.load(low_ptrs, mask=mask, other=0)
    m_ptrs = _pointer(pointers, POINTER_EXP_AVG, MOMENT, ALIGNED) + offs_s
    m = tl.load(m_ptrs, mask=mask, other=0)
    v_ptrs = _pointer(pointers, POINTER_EXP_AVG_SQ, tl.uint8 if MOMENT == tl.int8 else MOMENT, ALIGNED) + offs_s
    v = tl.load(v_ptrs, mask=mask, other=0)
    v_max_ptrs, v_max = v_ptrs, v
    if AMSGRAD:
        v_max_ptrs = _pointer(pointers, POINTER_MAX_EXP_AVG_SQ, MOMENT, ALIGNED) + offs_s
        v_max = tl.load(v_max_ptrs, mask=mask, other=0)
    m_scale_ptrs, v_scale_ptrs, m_scale, v_scale, mask_64 = p_ptrs, p_ptrs, p, p, mask
    if MOMENT == tl.int8:
        scale = tl.load(tile + TILE_SCALE) + block
        mask_64 = block * 64 < limit
        m_scale_ptrs = _pointer(pointers, POINTER_EXP_AVG_SCALE, tl.float32, False) + scale
        v_scale_ptrs = _pointer(pointers, POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + scale
        m_scale = tl.load(m_scale_ptrs, mask=mask_64, other=0.0)
        v_scale = tl.load(v_scale_ptrs, mask=mask_64, other=0.0)
        mask_64 = mask_64 & (tl.arange(0, GROUPS * 8 // L)[:, None] % (64 // (A * L)) == 0)
    copy_ptrs, mask_copy = p_ptrs, mask
    if WEIGHT_COPY:
        mask_copy = mask & (tl.load(pointers + POINTER_WEIGHT_COPY) + tl.zeros([1, 1], tl.int64) != 0)
        offs_c = _field(tile, TILE_COPY_OFF, ALIGNED) + row * _field(tile, TILE_COPY_STRIDE, ALIGNED) + col + lane
        copy_ptrs = _pointer(pointers, POINTER_WEIGHT_COPY, PARAM, ALIGNED) + offs_c

    hyper = (tl.load(hypers + HYPER_DECAY), tl.load(hypers + HYPER_WEIGHT1), tl.load(hypers + HYPER_BETA2),
             tl.load(hypers + HYPER_WEIGHT2), tl.load(hypers + HYPER_INV_ROOT2), tl.load(hypers + HYPER_EPS),
             tl.load(hypers + HYPER_STEP_SIZE))
    sign = tl.load(hypers + HYPER_SIGN)  # -1 to maximize
    bits = (place, lane, tl.load(pointers + POINTER_SEED), tl.load(hypers + HYPER_STEP).to(tl.int32))
    stream = tl.load(pointers + POINTER_STREAM) * 4
    return ((p_ptrs, copy_ptrs, low_ptrs, m_ptrs, v_ptrs, v_max_ptrs, m_scale_ptrs, v_scale_ptrs),
            (p, g, low, m, v, v_max, m_scale, v_scale), (mask, mask_64, mask_copy), bits, stream, hyper, sign)


@triton.jit
def _step_tile(
    ptrs, values, masks, bits, stream, hyper, sign, factor, A: tl.constexpr,
    PARAM: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, AMSGRAD: tl.constexpr, WEIGHT_COPY: tl.constexpr,
):
    """Compute and store what `_load_tile` loaded."""
    p_ptrs, copy_ptrs, low_ptrs, m_ptrs, v_ptrs, v_max_ptrs, m_scale_ptrs, v_scale_ptrs = ptrs
    p, g, low, m, v, v_max, m_scale, v_scale = values
    mask, mask_64, mask_copy = masks
    if MOMENT == tl.int8:
        m = decode8(m, m_scale)
        v = decode8(v, v_scale)
    master, m, v, v_max = adamw_step(
        join(p, low, MASTER), g.to(tl.float32) * (factor * sign), m.to(tl.float32), v.to(tl.float32),
        v_max.to(tl.float32), *hyper, AMSGRAD, MOMENT != tl.int8)

    if MASTER == "stochastic":
        p = round_stochastically(master, random16(*bits, stream + PARAM_BITS), PARAM)
    else:
        p, low = split(master, PARAM, MASTER)
    tl.store(p_ptrs, p, mask=mask)
    if WEIGHT_COPY:
        tl.store(copy_ptrs, p, mask=mask_copy)
    if MASTER == "split" or MASTER == "kahan":
        tl.store(low_ptrs, low, mask=mask)
    if MOMENT == tl.int8:
        m, scale = encode8(m, A)
        tl.store(m_scale_ptrs, scale, mask=mask_64)
    elif MOMENT != tl.float32:
        m = round_stochastically(m, random16(*bits, stream + EXP_AVG_BITS), MOMENT)
    tl.store(m_ptrs, m, mask=mask)
    if MOMENT == tl.int8:
        v, scale = encode8_stochastically(v, random16(*bits, stream + EXP_AVG_SQ_BITS), A)
        tl.store(v_scale_ptrs, scale, mask=mask_64)
    elif MOMENT != tl.float32:
        v = round_stochastically(v, random16(*bits, stream + EXP_AVG_SQ_BITS), MOMENT)
    tl.store(v_ptrs, v, mask=mask)
    if AMSGRAD:
        tl.store(v_max_ptrs, v_max.to(MOMENT), mask=mask)


@triton.jit
def head_grad_norm_kernel(
    tiles_ptr, pointers_ptr, scale_ptr, partial_ptr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):
    """The sum of squares of the unscaled gradient over each TILES tiles of the work list.

    Program w owns the tiles from w TILES on and writes partial[w] = sum (g / grad_scale)^2; the host
    adds the partial sums up, always in the same order.

    Shapes     tiles int64 [n_tiles, 14]; pointers int64 [n_params, 12]; grad_scale float32, one
               number, or None; partial float64 [ceil(n_tiles / TILES)]
    Dtypes     grad fp32/fp16/bf16; arithmetic fp32
    Untouched  everything but partial; gradients outside the work list are not read
    Bytes      per element: grad once; and 8 of partial for each program
    """
    L: tl.constexpr = (4 if GRAD == tl.float32 else 8) if ALIGNED else 1
    factor = _grad_factor(float("-inf"), _load(scale_ptr, 1.0), 1.0)
    total = 0.0
    for k in tl.static_range(TILES):
        tile = tiles_ptr + (tl.program_id(0).to(tl.int64) * TILES + k) * TILE_FIELDS
        row, col, lane, mask, _, _ = _places(tile, 1, ALIGNED, GROUPS, 1, L)
        g_ptrs = _pointer(pointers_ptr + tl.load(tile + TILE_PARAM) * POINTER_FIELDS, POINTER_GRAD, GRAD, ALIGNED) + (
            _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED) + col + lane)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * factor
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.reshape(total, [GROUPS * 8])).to(tl.float64))
