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
def _places(tile, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """(row, column, lane, mask) of the tile's elements in its rectangle, as [GROUPS, 8].

    ALIGNED: eight neighbours lie in one row, so that row and column are those of the group,
    [GROUPS, 1], and one division serves eight elements.
    """
    first = _field(tile, TILE_FIRST, ALIGNED).to(tl.int32)
    width = _field(tile, TILE_WIDTH, ALIGNED).to(tl.int32)
    limit = _field(tile, TILE_LIMIT, ALIGNED).to(tl.int32)
    if ALIGNED:
        at = first // 8 + tl.arange(0, GROUPS)[:, None]
        row = at // (width // 8)
        col = at % (width // 8) * 8
        lane = tl.arange(0, 8)[None, :]
        mask = tl.arange(0, GROUPS)[:, None] * 8 < limit
    else:
        count = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
        row = (first + count) // width
        col = (first + count) % width
        lane = tl.zeros([1, 8], tl.int32)
        mask = count < limit
    return row.to(tl.int64), col.to(tl.int64), lane, mask & (tl.arange(0, 8)[None, :] >= 0)


@triton.jit
def _grad_factor(norm_ptr, scale_ptr, max_norm):
    """What every gradient is multiplied by: 1 / grad_scale, and where norm > max_norm, max_norm / (norm + 1e-6)."""
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.div_rn(1.0, tl.load(scale_ptr))
    if norm_ptr is not None:
        clip = tl.div_rn(max_norm, tl.load(norm_ptr).to(tl.float32) + 1e-6)
        factor *= tl.where(clip >= 1.0, 1.0, clip)  # a NaN stays one, as in torch.clamp
    return factor


@triton.jit
def head_adamw_kernel(
    tiles_ptr, pointers_ptr, hypers_ptr, norm_ptr, scale_ptr, found_inf_ptr, max_norm,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, AMSGRAD: tl.constexpr,
    WEIGHT_COPY: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
):
    """One AdamW step on the selected slices of many weights, in place.

    Program w owns TILES tiles of the work list, from tile w TILES on: each 8 GROUPS elements of one
    rectangle of one parameter, row after row.

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
    if found_inf_ptr is not None:
        if tl.load(found_inf_ptr) != 0.0:
            return
    factor = _grad_factor(norm_ptr, scale_ptr, max_norm)
    for k in tl.static_range(TILES):
        tile = tiles_ptr + (tl.program_id(0).to(tl.int64) * TILES + k) * TILE_FIELDS
        _step_tile(tile, pointers_ptr, hypers_ptr, factor, PARAM, GRAD, MOMENT, MASTER, AMSGRAD, WEIGHT_COPY, ALIGNED, GROUPS)


@triton.jit
def _step_tile(
    tile, pointers_ptr, hypers_ptr, factor, PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    MASTER: tl.constexpr, AMSGRAD: tl.constexpr, WEIGHT_COPY: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):
    pointers = pointers_ptr + tl.load(tile + TILE_PARAM) * POINTER_FIELDS
    hypers = hypers_ptr + (tl.load(pointers + POINTER_HYPER) + tl.load(tile + TILE_HYPER)) * HYPER_FIELDS
    row, col, lane, mask = _places(tile, ALIGNED, GROUPS)
    offs_p = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED) + col + lane
    offs_g = _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED) + col + lane
    place = _field(tile, TILE_S_OFF, ALIGNED) + row * _field(tile, TILE_S_STRIDE, ALIGNED) + col
    QUANTISED: tl.constexpr = MOMENT == tl.int8
    p_ptrs = _pointer(pointers, POINTER_PARAM, PARAM, ALIGNED) + offs_p
    m_ptrs = _pointer(pointers, POINTER_EXP_AVG, MOMENT, ALIGNED) + (place + lane)
    v_ptrs = _pointer(pointers, POINTER_EXP_AVG_SQ, tl.uint8 if QUANTISED else MOMENT, ALIGNED) + (place + lane)
    low_ptrs = _pointer(pointers, POINTER_LOW, tl.int16 if MASTER == "split" else PARAM, ALIGNED) + (place + lane)

    master = join(tl.load(p_ptrs, mask=mask, other=0.0), low_ptrs, mask, MASTER)
    g = tl.load(_pointer(pointers, POINTER_GRAD, GRAD, ALIGNED) + offs_g, mask=mask, other=0.0).to(tl.float32)
    if QUANTISED:
        group = tl.arange(0, GROUPS)[:, None]
        real = group * 8 < tl.load(tile + TILE_LIMIT)
        m_scale_ptrs = _pointer(pointers, POINTER_EXP_AVG_SCALE, tl.float32, False) + (
            tl.load(tile + TILE_SCALE) + group // 8)
        v_scale_ptrs = _pointer(pointers, POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + (
            tl.load(tile + TILE_SCALE) + group // 8)
        m = decode8(tl.load(m_ptrs, mask=mask, other=0), tl.load(m_scale_ptrs, mask=real, other=0.0))
        v = decode8(tl.load(v_ptrs, mask=mask, other=0), tl.load(v_scale_ptrs, mask=real, other=0.0))
    else:
        m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    v_max = v
    if AMSGRAD:
        v_max_ptrs = _pointer(pointers, POINTER_MAX_EXP_AVG_SQ, MOMENT, ALIGNED) + (place + lane)
        v_max = tl.load(v_max_ptrs, mask=mask, other=0.0).to(tl.float32)

    factor *= tl.load(hypers + HYPER_SIGN)  # -1 to maximize
    master, m, v, v_max = adamw_step(
        master, g * factor, m, v, v_max, tl.load(hypers + HYPER_DECAY), tl.load(hypers + HYPER_WEIGHT1),
        tl.load(hypers + HYPER_BETA2), tl.load(hypers + HYPER_WEIGHT2), tl.load(hypers + HYPER_INV_ROOT2),
        tl.load(hypers + HYPER_EPS), tl.load(hypers + HYPER_STEP_SIZE), AMSGRAD)

    step = tl.load(hypers + HYPER_STEP).to(tl.int32)
    stream = tl.load(pointers + POINTER_STREAM) * 4
    seed = tl.load(pointers + POINTER_SEED)
    if MASTER == "stochastic":
        p = round_stochastically(master, random16(place, lane, seed, step, stream + PARAM_BITS, ALIGNED), PARAM)
    else:
        p = split(master, low_ptrs, mask, PARAM, MASTER)
    tl.store(p_ptrs, p, mask=mask)
    if WEIGHT_COPY:
        if tl.load(pointers + POINTER_WEIGHT_COPY) != 0:
            offs_c = _field(tile, TILE_COPY_OFF, ALIGNED) + row * _field(tile, TILE_COPY_STRIDE, ALIGNED) + col + lane
            tl.store(_pointer(pointers, POINTER_WEIGHT_COPY, PARAM, ALIGNED) + offs_c, p, mask=mask)
    if MOMENT == tl.float32:
        tl.store(m_ptrs, m, mask=mask)
        tl.store(v_ptrs, v, mask=mask)
    elif QUANTISED:
        codes, scale = encode8(m)
        tl.store(m_ptrs, codes.to(tl.int8), mask=mask)
        tl.store(m_scale_ptrs, scale, mask=real & (group % 8 == 0))
        codes, scale = encode8_stochastically(v, random16(place, lane, seed, step, stream + EXP_AVG_SQ_BITS, ALIGNED))
        tl.store(v_ptrs, codes.to(tl.uint8), mask=mask)
        tl.store(v_scale_ptrs, scale, mask=real & (group % 8 == 0))
    else:
        noise = random16(place, lane, seed, step, stream + EXP_AVG_BITS, ALIGNED)
        tl.store(m_ptrs, round_stochastically(m, noise, MOMENT), mask=mask)
        noise = random16(place, lane, seed, step, stream + EXP_AVG_SQ_BITS, ALIGNED)
        tl.store(v_ptrs, round_stochastically(v, noise, MOMENT), mask=mask)
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
    Bytes      per element: grad once
    """
    factor = _grad_factor(None, scale_ptr, 0.0)
    total = tl.zeros([GROUPS, 8], tl.float32)
    for k in tl.static_range(TILES):
        tile = tiles_ptr + (tl.program_id(0).to(tl.int64) * TILES + k) * TILE_FIELDS
        row, col, lane, mask = _places(tile, ALIGNED, GROUPS)
        g_ptrs = _pointer(pointers_ptr + tl.load(tile + TILE_PARAM) * POINTER_FIELDS, POINTER_GRAD, GRAD, ALIGNED) + (
            _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED) + col + lane)
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32) * factor
        total += g * g
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0).to(tl.float64))
