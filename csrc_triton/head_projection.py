"""The passes of `head_delta` over W_h = q_h^T k_g v_g^T."""

import triton
import triton.language as tl

from .delta_sums import (
    SCAN_FIELDS, START_CARRY, START_FAR, START_GROWTH, STAT_FAR, STAT_FIELDS, STAT_MOVED, bound, last_of_8, lengths,
    load_start, step, store_scan, store_stats, sum_all,
)
from .series import LOG2E, TAYLOR, expm1_less

# Columns of the table `heads`, as in ops/delta/tables.py, and the length of its rows.
HEAD_Q_BASE, HEAD_Q_TASK, HEAD_GROUP = map(tl.constexpr, range(3))
HEAD_FIELDS = tl.constexpr(3)


@triton.jit
def _form_projection(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """ROWS rows of W_h = q^T M and of its change dq^T M_T + q^T dM, row-major [ROWS * V_PAD]."""
    head, tile = tl.program_id(0), tl.program_id(1)
    entry = heads_ptr + head.to(tl.int64) * HEAD_FIELDS
    qb_ptr = tl.load(entry + HEAD_Q_BASE).to(tl.pointer_type(BASE))
    qt_ptr = tl.load(entry + HEAD_Q_TASK).to(tl.pointer_type(TASK))
    group = tl.load(entry + HEAD_GROUP)
    rows = tile * ROWS + tl.arange(0, ROWS)
    vs = tl.arange(0, V_PAD)
    w = tl.zeros((ROWS, V_PAD), dtype=tl.float32)
    dw = tl.zeros((ROWS, V_PAD), dtype=tl.float32)
    for k in range(0, D_K, K_BLOCK):
        ks = (k + tl.arange(0, K_BLOCK))[:, None]
        in_q = (ks < D_K) & (rows[None, :] < d_model)
        qb = tl.load(qb_ptr + ks.to(tl.int64) * stride_qb + rows[None, :], mask=in_q, other=0.0).to(tl.float32)
        qt = tl.load(qt_ptr + ks.to(tl.int64) * stride_qt + rows[None, :], mask=in_q, other=0.0).to(tl.float32)
        offs_m = group * (D_K * D_V) + ks * D_V + vs[None, :]
        in_m = (ks < D_K) & (vs[None, :] < D_V)
        mb = tl.load(mb_ptr + offs_m, mask=in_m, other=0.0)
        mt = tl.load(mt_ptr + offs_m, mask=in_m, other=0.0)
        md = tl.load(md_ptr + offs_m, mask=in_m, other=0.0)
        qb_rows = tl.trans(qb)
        w = tl.dot(qb_rows, mb, acc=w, input_precision=PRECISION)
        dw = tl.dot(tl.trans(qt - qb), mt, acc=dw, input_precision=PRECISION)
        dw = tl.dot(qb_rows, md, acc=dw, input_precision=PRECISION)
    mask = (rows[:, None] < d_model) & (vs[None, :] < D_V)
    counted = mask & ((rows[:, None] != d_model - 1) | (vs[None, :] != D_V - 1))
    shape: tl.constexpr = (ROWS * V_PAD // 8, 8)
    slot = head.to(tl.int64) * tl.num_programs(1) + tile
    return tl.reshape(w, shape), tl.reshape(dw, shape), tl.reshape(mask, shape), tl.reshape(counted, shape), slot


@triton.jit
def projection_stats_kernel(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, stats_ptr, d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, NORMS: tl.constexpr,
):
    """Pass A over W_h = q_h^T k_g v_g^T, formed in registers and never stored.

    Program (h, i) owns rows [i ROWS, (i + 1) ROWS) of head h's W, [d_model, D_V].

        W = q_B^T M_B;  dW = (q_T - q_B)^T M_T + q_B^T dM     (a difference of products is never taken)

    Shapes     q [D_K, d_model] with a row stride per model; M_B, M_T, dM [groups, D_K, D_V];
               heads [n_heads, 3] int64: addresses of q_B and q_T, group; stats [n_slots, 8]
    Dtypes     q fp32/fp16/bf16; M fp32 rounded from fp64; products accumulate in fp32
    Scalars    inv_tau = 1 / tau
    Untouched  slots without a tile
    Bytes      one read of q of both models, of M once per program from L2
    """
    w, dw, mask, _, slot = _form_projection(
        heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt,
        BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
    e = tl.where(mask, tl.exp2(w * (inv_tau * LOG2E)), 0.0)
    dd = dw * dw
    out = stats_ptr + slot * STAT_FIELDS
    store_stats(out, e, dd, w * w, w * dw, NORMS)
    farthest = bound(dd, inv_tau)
    if farthest <= TAYLOR:
        moved = sum_all(e * expm1_less(dw, 0.0, inv_tau, False))
    else:
        moved = sum_all(e * expm1_less(dw, 0.0, inv_tau, True))
    tl.store(out + STAT_MOVED, moved)
    tl.store(out + STAT_FAR, farthest)


@triton.jit
def _scan_projection(w, dw, mask, counted, start, inv_tau, out, EXTRA: tl.constexpr, EXACT: tl.constexpr):
    none = tl.zeros((w.shape[0], 4), tl.float32)
    inside, sums = step(w, dw, mask, start, inv_tau, (none, none, none, none, none, none), False, EXTRA, EXACT)
    whole = last_of_8(inside)
    before = start[START_CARRY] + (tl.cumsum(whole, axis=0) - whole)
    store_scan(out, lengths(inside, before, counted, False), sums, start[START_GROWTH], EXTRA, EXACT)


@triton.jit
def projection_scan_kernel(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, starts_ptr, scans_ptr, d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, EXTRA: tl.constexpr,
):
    """Pass B over W_h: as `head_delta_scan_kernel`, on the tiles of `projection_stats_kernel`.

    Shapes     starts [n_slots, 5], scans [n_slots, 8] float32
    Bytes      a second read of q of both models
    """
    w, dw, mask, counted, slot = _form_projection(
        heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt,
        BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
    start, out = load_start(starts_ptr, slot), scans_ptr + slot * SCAN_FIELDS
    if start[START_FAR] <= TAYLOR:
        _scan_projection(w, dw, mask, counted, start, inv_tau, out, EXTRA, False)
    else:
        _scan_projection(w, dw, mask, counted, start, inv_tau, out, EXTRA, True)
