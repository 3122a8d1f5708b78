"""The sliced AdamW step and the sliced gradient norm."""

import triton
import triton.language as tl

from .numerics import (
    adamw_step,
    decode8,
    encode8,
    encode8_stochastically,
    join_bf16,
    join_fp16,
    random16,
    round_stochastically,
    split_bf16,
    split_fp16,
)

# Columns of the tables that the host fills; `alps_kernels.ops.adamw_tables` names them.
TILE_FIELDS = tl.constexpr(14)
POINTER_FIELDS = tl.constexpr(12)
HYPER_FIELDS = tl.constexpr(9)


@triton.jit
def _field(row, index: tl.constexpr, ALIGNED: tl.constexpr):
    """A length or offset of the work list; ALIGNED: it is a multiple of 8."""
    value = tl.load(row + index)
    if ALIGNED:
        value = tl.multiple_of(value, 8)
    return value


@triton.jit
def _pointer(row, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _places(tile, ALIGNED: tl.constexpr, GROUPS: tl.constexpr):
    """(row, column, lane, mask) of the tile's elements in its rectangle, as [GROUPS, 8].

    ALIGNED: eight neighbours lie in one row, so that row and column are those of the group,
    [GROUPS, 1], and one division serves eight elements.
    """
    first = _field(tile, 8, ALIGNED).to(tl.int32)
    width = _field(tile, 9, ALIGNED).to(tl.int32)
    limit = _field(tile, 10, ALIGNED).to(tl.int32)
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
def _joined(p, low_ptrs, mask, MASTER: tl.constexpr):
    """The float32 weights that param and its low part stand for."""
    if MASTER == "split":
        low = tl.load(low_ptrs, mask=mask, other=0)
        return join_bf16(p, low) if p.dtype == tl.bfloat16 else join_fp16(p, low)
    if MASTER == "kahan":
        return p.to(tl.float32) + tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    return p.to(tl.float32)


@triton.jit
def _parted(master, low_ptrs, mask, PARAM: tl.constexpr, MASTER: tl.constexpr):
    """param's part of float32 weights; the rest is stored."""
    if MASTER == "split":
        if PARAM == tl.bfloat16:
            p, low = split_bf16(master)
        else:
            p, low = split_fp16(master)
        tl.store(low_ptrs, low, mask=mask)
        return p
    p = master.to(PARAM)
    if MASTER == "kahan":
        wide = p.to(tl.float32)
        rest = tl.where(tl.abs(wide) <= 3.4028234663852886e38, master - wide, 0.0)
        tl.store(low_ptrs, rest.to(PARAM), mask=mask)
    return p


@triton.jit
def head_adamw_kernel(
    tiles_ptr, pointers_ptr, hypers_ptr, control_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, AMSGRAD: tl.constexpr,
    MIRROR: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):
    """One AdamW step on the selected slices of many weights, in place.

    Program w owns tile w of the work list: 8 GROUPS elements of one rectangle of one parameter,
    row after row.

        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)

    Shapes     tiles int64 [n_tiles, 14]; pointers int64 [n_params, 12]; hypers float32 [n, 9];
               control float32 [2] (gradient factor, skip) or None
    Dtypes     param, grad fp32/fp16/bf16; moments fp32, bf16, or 8-bit codes (MOMENT int8) with a
               float32 scale for each 64; low int16 (split) or param's (kahan); arithmetic fp32,
               every operation rounded; one rounding of each value, at its store
    Scalars    all in the tables: no step recompiles
    Untouched  elements outside the work list are neither read nor written
    Bytes      per element: 2 of param, grad once, 2 of each moment: 22 for bf16 weights with fp32
               moments, 26 with MASTER "split" or "kahan", 28 for fp32; 14.25 for bf16 "split" with
               8-bit moments; MIRROR: one more of param; and 112 of work list for each tile
    """
    if control_ptr is not None:
        if tl.load(control_ptr + 1) != 0.0:
            return
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    pointers = pointers_ptr + tl.load(tile) * POINTER_FIELDS
    hypers = hypers_ptr + (tl.load(pointers + 9) + tl.load(tile + 1)) * HYPER_FIELDS
    row, col, lane, mask = _places(tile, ALIGNED, GROUPS)
    offs_p = _field(tile, 2, ALIGNED) + row * _field(tile, 5, ALIGNED) + col + lane
    offs_g = _field(tile, 3, ALIGNED) + row * _field(tile, 6, ALIGNED) + col + lane
    place = _field(tile, 4, ALIGNED) + row * _field(tile, 7, ALIGNED) + col
    QUANTISED: tl.constexpr = MOMENT == tl.int8
    p_ptrs = _pointer(pointers, PARAM, ALIGNED) + offs_p
    m_ptrs = _pointer(pointers + 2, MOMENT, ALIGNED) + (place + lane)
    v_ptrs = _pointer(pointers + 3, tl.uint8 if QUANTISED else MOMENT, ALIGNED) + (place + lane)
    low_ptrs = _pointer(pointers + 5, tl.int16 if MASTER == "split" else PARAM, ALIGNED) + (place + lane)

    master = _joined(tl.load(p_ptrs, mask=mask, other=0.0), low_ptrs, mask, MASTER)
    g = tl.load(_pointer(pointers + 1, GRAD, ALIGNED) + offs_g, mask=mask, other=0.0).to(tl.float32)
    if QUANTISED:
        group = tl.arange(0, GROUPS)[:, None]
        real = group * 8 < tl.load(tile + 10)
        m_scale_ptrs = _pointer(pointers + 6, tl.float32, False) + (tl.load(tile + 11) + group // 8)
        v_scale_ptrs = _pointer(pointers + 7, tl.float32, False) + (tl.load(tile + 11) + group // 8)
        m = decode8(tl.load(m_ptrs, mask=mask, other=0), tl.load(m_scale_ptrs, mask=real, other=0.0))
        v = decode8(tl.load(v_ptrs, mask=mask, other=0), tl.load(v_scale_ptrs, mask=real, other=0.0))
    else:
        m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    v_max = v
    if AMSGRAD:
        v_max_ptrs = _pointer(pointers + 4, MOMENT, ALIGNED) + (place + lane)
        v_max = tl.load(v_max_ptrs, mask=mask, other=0.0).to(tl.float32)

    factor = tl.load(hypers + 7)  # -1 to maximize
    if control_ptr is not None:
        factor *= tl.load(control_ptr)
    master, m, v, v_max = adamw_step(
        master, g * factor, m, v, v_max, tl.load(hypers), tl.load(hypers + 1), tl.load(hypers + 2),
        tl.load(hypers + 3), tl.load(hypers + 4), tl.load(hypers + 5), tl.load(hypers + 6), AMSGRAD)

    step = tl.load(hypers + 8).to(tl.int32)
    stream = tl.load(pointers + 10) * 4
    seed = tl.load(pointers + 11)
    if MASTER == "stochastic":
        p = round_stochastically(master, random16(place, lane, seed, step, stream, ALIGNED), PARAM)
    else:
        p = _parted(master, low_ptrs, mask, PARAM, MASTER)
    tl.store(p_ptrs, p, mask=mask)
    if MIRROR:
        if tl.load(pointers + 8) != 0:
            offs_w = _field(tile, 12, ALIGNED) + row * _field(tile, 13, ALIGNED) + col + lane
            tl.store(_pointer(pointers + 8, PARAM, ALIGNED) + offs_w, p, mask=mask)
    if MOMENT == tl.float32:
        tl.store(m_ptrs, m, mask=mask)
        tl.store(v_ptrs, v, mask=mask)
    elif QUANTISED:
        codes, scale = encode8(m)
        tl.store(m_ptrs, codes.to(tl.int8), mask=mask)
        tl.store(m_scale_ptrs, scale, mask=real & (group % 8 == 0))
        codes, scale = encode8_stochastically(v, random16(place, lane, seed, step, stream + 2, ALIGNED))
        tl.store(v_ptrs, codes.to(tl.uint8), mask=mask)
        tl.store(v_scale_ptrs, scale, mask=real & (group % 8 == 0))
    else:
        noise = random16(place, lane, seed, step, stream + 1, ALIGNED)
        tl.store(m_ptrs, round_stochastically(m, noise, MOMENT), mask=mask)
        noise = random16(place, lane, seed, step, stream + 2, ALIGNED)
        tl.store(v_ptrs, round_stochastically(v, noise, MOMENT), mask=mask)
    if AMSGRAD:
        tl.store(v_max_ptrs, v_max.to(MOMENT), mask=mask)


@triton.jit
def head_grad_norm_kernel(
    tiles_ptr, pointers_ptr, partial_ptr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, GROUPS: tl.constexpr,
):
    """The sum of squares of the gradient over each tile of the work list.

    Program w owns tile w and writes partial[w] = sum g^2; the host adds the partial sums up in
    float64, always in the same order.

    Shapes     tiles int64 [n_tiles, 14]; pointers int64 [n_params, 12]; partial float32 [n_tiles]
    Dtypes     grad fp32/fp16/bf16; arithmetic fp32
    Untouched  everything but partial; gradients outside the work list are not read
    Bytes      per element: grad once
    """
    tile = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    row, col, lane, mask = _places(tile, ALIGNED, GROUPS)
    g_ptrs = _pointer(pointers_ptr + tl.load(tile) * POINTER_FIELDS + 1, GRAD, ALIGNED) + (
        _field(tile, 3, ALIGNED) + row * _field(tile, 6, ALIGNED) + col + lane)
    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(g * g, 1), 0))
