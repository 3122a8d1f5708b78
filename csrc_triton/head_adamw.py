"""The sliced AdamW step and the sliced gradient norm."""

import triton
import triton.language as tl

from .numerics import adamw_step, join_bf16, join_fp16, random16, round_stochastically, split_bf16, split_fp16

# Columns of the tables that the host fills; `alps_kernels.ops.adamw_tables` names them.
TILE_FIELDS = tl.constexpr(10)
POINTER_FIELDS = tl.constexpr(8)
HYPER_FIELDS = tl.constexpr(9)


@triton.jit
def _tile(tiles_ptr, ALIGNED: tl.constexpr):
    """The row of the work list that this program owns; ALIGNED: every length in it is a multiple of 8."""
    row = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    param = tl.load(row)
    hyper = tl.load(row + 1)
    p_off = tl.load(row + 2)
    g_off = tl.load(row + 3)
    s_off = tl.load(row + 4)
    p_stride = tl.load(row + 5)
    g_stride = tl.load(row + 6)
    s_stride = tl.load(row + 7)
    n_cols = tl.load(row + 8)
    limit = tl.load(row + 9)
    if ALIGNED:
        p_off = tl.multiple_of(p_off, 8)
        g_off = tl.multiple_of(g_off, 8)
        s_off = tl.multiple_of(s_off, 8)
        p_stride = tl.multiple_of(p_stride, 8)
        g_stride = tl.multiple_of(g_stride, 8)
        s_stride = tl.multiple_of(s_stride, 8)
        n_cols = tl.multiple_of(n_cols, 8)
        limit = tl.multiple_of(limit, 8)
    return param, hyper, p_off, g_off, s_off, p_stride, g_stride, s_stride, n_cols, limit


@triton.jit
def _pointer(row, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def head_adamw_kernel(
    tiles_ptr, pointers_ptr, hypers_ptr, control_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, MASTER: tl.constexpr, AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """One AdamW step on the selected slices of many weights, in place.

    Program w owns tile w of the work list: [ROWS, COLS] elements of one parameter.

        m <- beta1 m + (1 - beta1) g ;  v <- beta2 v + (1 - beta2) g^2
        p <- p (1 - lr wd) - lr (m / c1) / (sqrt(v / c2) + eps)

    Shapes     tiles int64 [n_tiles, 10]; pointers int64 [n_params, 8]; hypers float32 [n, 9];
               control float32 [2] (gradient factor, skip) or None
    Dtypes     param, grad fp32/fp16/bf16; moments fp32/bf16; low int16 (split) or param's (kahan);
               arithmetic fp32, every operation rounded; one rounding of each value, at its store
    Scalars    all in the tables: no step recompiles
    Untouched  elements outside the work list are neither read nor written
    Bytes      per element: 2 of param, grad once, 2 of each moment: 22 for bf16 weights with fp32
               moments, 26 with MASTER "split" or "kahan", 28 for fp32
    """
    if control_ptr is not None:
        if tl.load(control_ptr + 1) != 0.0:
            return
    param, hyper, p_off, g_off, s_off, p_stride, g_stride, s_stride, n_cols, limit = _tile(tiles_ptr, ALIGNED)
    pointers = pointers_ptr + param * POINTER_FIELDS
    hypers = hypers_ptr + hyper * HYPER_FIELDS
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (cols < n_cols) & (rows * COLS + cols < limit)
    wide_rows = rows.to(tl.int64)
    p_ptrs = _pointer(pointers, PARAM, ALIGNED) + (p_off + wide_rows * p_stride + cols)
    g_ptrs = _pointer(pointers + 1, GRAD, ALIGNED) + (g_off + wide_rows * g_stride + cols)
    offs_state = s_off + wide_rows * s_stride + cols
    m_ptrs = _pointer(pointers + 2, MOMENT, ALIGNED) + offs_state
    v_ptrs = _pointer(pointers + 3, MOMENT, ALIGNED) + offs_state

    p = tl.load(p_ptrs, mask=mask, other=0.0)
    g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    v_max = v
    if AMSGRAD:
        v_max_ptrs = _pointer(pointers + 4, MOMENT, ALIGNED) + offs_state
        v_max = tl.load(v_max_ptrs, mask=mask, other=0.0).to(tl.float32)
    if MASTER == "split":
        low_ptrs = _pointer(pointers + 5, tl.int16, ALIGNED) + offs_state
        low = tl.load(low_ptrs, mask=mask, other=0)
        master = join_bf16(p, low) if PARAM == tl.bfloat16 else join_fp16(p, low)
    elif MASTER == "kahan":
        low_ptrs = _pointer(pointers + 5, PARAM, ALIGNED) + offs_state
        master = p.to(tl.float32) + tl.load(low_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        master = p.to(tl.float32)

    factor = tl.load(hypers + 7)  # -1 to maximize
    if control_ptr is not None:
        factor *= tl.load(control_ptr)
    master, m, v, v_max = adamw_step(
        master, g * factor, m, v, v_max, tl.load(hypers), tl.load(hypers + 1), tl.load(hypers + 2),
        tl.load(hypers + 3), tl.load(hypers + 4), tl.load(hypers + 5), tl.load(hypers + 6), AMSGRAD)

    step = tl.load(hypers + 8).to(tl.int32)
    stream = tl.load(pointers + 6) * 4
    seed = tl.load(pointers + 7)
    if MOMENT == tl.float32:
        tl.store(m_ptrs, m, mask=mask)
        tl.store(v_ptrs, v, mask=mask)
    else:
        noise = random16(s_off, s_stride, seed, step, stream + 1, ROWS, COLS, ALIGNED)
        tl.store(m_ptrs, round_stochastically(m, noise, MOMENT), mask=mask)
        noise = random16(s_off, s_stride, seed, step, stream + 2, ROWS, COLS, ALIGNED)
        tl.store(v_ptrs, round_stochastically(v, noise, MOMENT), mask=mask)
    if AMSGRAD:
        tl.store(v_max_ptrs, v_max.to(MOMENT), mask=mask)
    if MASTER == "split":
        if PARAM == tl.bfloat16:
            p, low = split_bf16(master)
        else:
            p, low = split_fp16(master)
        tl.store(low_ptrs, low, mask=mask)
    elif MASTER == "kahan":
        p = master.to(PARAM)
        wide = p.to(tl.float32)
        rest = tl.where(tl.abs(wide) <= 3.4028234663852886e38, master - wide, 0.0)
        tl.store(low_ptrs, rest.to(PARAM), mask=mask)
    elif MASTER == "stochastic":
        noise = random16(s_off, s_stride, seed, step, stream, ROWS, COLS, ALIGNED)
        p = round_stochastically(master, noise, PARAM)
    else:
        p = master.to(PARAM)
    tl.store(p_ptrs, p, mask=mask)


@triton.jit
def head_grad_norm_kernel(
    tiles_ptr, pointers_ptr, partial_ptr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """The sum of squares of the gradient over each tile of the work list.

    Program w owns tile w and writes partial[w] = sum g^2; the host adds the partial sums up in
    float64, always in the same order.

    Shapes     tiles int64 [n_tiles, 10]; pointers int64 [n_params, 8]; partial float32 [n_tiles]
    Dtypes     grad fp32/fp16/bf16; arithmetic fp32
    Untouched  everything but partial; gradients outside the work list are not read
    Bytes      per element: grad once
    """
    param, hyper, p_off, g_off, s_off, p_stride, g_stride, s_stride, n_cols, limit = _tile(tiles_ptr, ALIGNED)
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (cols < n_cols) & (rows * COLS + cols < limit)
    g_ptrs = _pointer(pointers_ptr + param * POINTER_FIELDS + 1, GRAD, ALIGNED)
    g = tl.load(g_ptrs + (g_off + rows.to(tl.int64) * g_stride + cols), mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(g * g, 1), 0))
