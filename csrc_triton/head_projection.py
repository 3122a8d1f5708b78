"""The passes of `head_delta` over W_h = q_h^T k_g v_g^T."""

import triton
import triton.language as tl

from .delta_heads import SUM_FIELDS, load_head, load_listed, store_sums
from .delta_sums import (
    STAT_FIELDS, add_each, first_and_second, scan, scanned, store_stats, weigh, zeros,
)
from .series import TAYLOR


@triton.jit
def _form_projection(
    head, tile, bases_ptr, tasks_ptr, groups_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """ROWS rows of W_h = q^T M, of its change dq^T M_T + q^T dM and what is there, as `weigh` takes them."""
    qb_ptr = tl.load(bases_ptr + head).to(tl.pointer_type(BASE))
    qt_ptr = tl.load(tasks_ptr + head).to(tl.pointer_type(TASK))
    group = tl.load(groups_ptr + head)
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
    b0, b1 = first_and_second(w)
    d0, d1 = first_and_second(dw)
    first = tl.arange(0, ROWS * V_PAD // 16) * 16  # of the 16 neighbours of a lane
    row, col = (first // V_PAD)[:, None], (first % V_PAD)[:, None] + tl.arange(0, 8)[None, :]
    in0, in1 = (tile * ROWS + row < d_model) & (col < D_V), (tile * ROWS + row < d_model) & (col + 8 < D_V)
    behind = tl.minimum(d_model - tile * ROWS, ROWS) * D_V - (first // V_PAD * D_V + first % V_PAD) - 16
    return (b0, d0, in0), (b1, d1, in1), behind


@triton.jit
def projection_stats_kernel(
    bases_ptr, tasks_ptr, groups_ptr, mb_ptr, mt_ptr, md_ptr, stats_ptr, d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, V_PAD: tl.constexpr,
    ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, ALL: tl.constexpr,
):
    """Pass A over W_h = q_h^T k_g v_g^T, formed in registers and never stored.

    Program (h, i) owns tile i of head h: rows [i ROWS, (i + 1) ROWS) of its W, [d_model, D_V].

        W = q_B^T M_B;  dW = (q_T - q_B)^T M_T + q_B^T dM     (a difference of products is never taken)

    Shapes     q [D_K, d_model] with a row stride per model; M_B, M_T, dM [groups, D_K, D_V]; of each head, int64:
               bases and tasks, the addresses of its q, and groups; stats [heads * tiles, 18], see `store_stats`
    Dtypes     q fp32/fp16/bf16; M fp32 rounded from fp64; products accumulate in fp32
    Scalars    inv_tau = 1 / tau
    Untouched  of a row of stats what only ALL metrics need
    Bytes      one read of q of both models, of M once per program from L2
    """
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    left, right, behind = _form_projection(
        head, tile, bases_ptr, tasks_ptr, groups_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt,
        BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
    out = stats_ptr + (head * tl.num_programs(1) + tile) * STAT_FIELDS
    if _store_stats(out, left, right, behind, inv_tau, ALL, False) > TAYLOR:
        _store_stats(out, left, right, behind, inv_tau, ALL, True)


@triton.jit
def _store_stats(out, left, right, behind, inv_tau, ALL: tl.constexpr, EXACT: tl.constexpr):
    none = zeros(9 if ALL else 1, behind.shape[0], 4)
    piece, sums = weigh(left, right, behind, inv_tau, none, True, ALL, EXACT)
    return store_stats(out, True, (piece,), sums, inv_tau, 1)


@triton.jit
def _scan(left, right, carry, r, inv_tau, EXACT: tl.constexpr):
    _, sums = scan(left, right, carry, r, inv_tau, zeros(6 if EXACT else 1, left[0].shape[0], 0), 1, True, EXACT)
    return scanned(sums, True)


@triton.jit
def projection_scan_kernel(
    bases_ptr, tasks_ptr, groups_ptr, mb_ptr, mt_ptr, md_ptr, list_ptr, carries_ptr, heads_ptr, sums_ptr, slots,
    d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr, V_PAD: tl.constexpr,
    ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """Pass B over W_h: as `head_delta_scan_kernel`, on the tiles of `projection_stats_kernel`.

    Bytes      another read of q of both models for each tile that is listed
    """
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * slots
    r, listed = load_head(heads_ptr, head)
    sums, i = scanned((), True), tl.program_id(1)
    while i < listed:
        tile, _, exact, carry = load_listed(list_ptr, carries_ptr, first, i, listed, first, first + slots)
        left, right, _ = _form_projection(
            head, tile.to(tl.int32), bases_ptr, tasks_ptr, groups_ptr, mb_ptr, mt_ptr, md_ptr,
            d_model, stride_qb, stride_qt, BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
        if exact:
            more = _scan(left, right, carry, r, inv_tau, True)
        else:
            more = _scan(left, right, carry, r, inv_tau, False)
        sums = add_each(sums, more)
        i += tl.num_programs(1)
    store_sums(sums_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * SUM_FIELDS, sums)
