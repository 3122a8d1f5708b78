"""Per-head statistics and the PAD scan over a base and a task model."""

import triton
import triton.language as tl

from .numerics import LOG2E, divergences, expm1

# Columns of the tables that the host fills; `alps_kernels.ops.delta_tables` names them.
TILE_FIELDS = tl.constexpr(5)
SEGMENT_FIELDS = tl.constexpr(8)
STAT_FIELDS = tl.constexpr(8)
SCAN_FIELDS = tl.constexpr(8)
HEAD_FIELDS = tl.constexpr(4)


@triton.jit
def _load_pair(
    row, segments_ptr, BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):
    """The base's elements of a tile and their change, float32 [BLOCK], how many there are, and the tile's slot."""
    segment = segments_ptr + tl.load(row) * SEGMENT_FIELDS
    start = tl.load(row + 1)
    count = tl.load(row + 2)
    slot = tl.load(row + 3)
    base = tl.load(segment).to(tl.pointer_type(BASE))
    task = tl.load(segment + 1).to(tl.pointer_type(TASK))
    offs = tl.arange(0, BLOCK)
    if FLAT:  # contiguous, 16-byte aligned, every length a multiple of 16 elements
        base, task = tl.multiple_of(base, 16), tl.multiple_of(task, 16)
        start, count = tl.multiple_of(start, 16), tl.multiple_of(count, 16)
        offs_base = start + offs
        offs_task = start + offs
    else:
        cols = tl.load(segment + 2)
        i = start + offs
        r, c = i // cols, i % cols
        offs_base = r * tl.load(segment + 3) + c * tl.load(segment + 4)
        offs_task = r * tl.load(segment + 5) + c * tl.load(segment + 6)
    if FULL:  # BLOCK elements
        b = tl.load(base + offs_base).to(tl.float32)
        t = tl.load(task + offs_task).to(tl.float32)
    else:
        b = tl.load(base + offs_base, mask=offs < count, other=0.0).to(tl.float32)
        t = tl.load(task + offs_task, mask=offs < count, other=0.0).to(tl.float32)
    return b, t - b, count, slot


@triton.jit
def _store_stats(b, d, mask, slot, inv_tau, stats_ptr, FULL: tl.constexpr):
    """One tile's maximum, its sums of e and e u relative to that maximum, and of d d, b b, b d."""
    logit = b * (inv_tau * LOG2E)
    if not FULL:
        logit = tl.where(mask, logit, float("-inf"))
    top = tl.max(logit, axis=0)
    e = tl.exp2(logit - top)
    x = d * inv_tau
    largest = tl.max(tl.abs(x), axis=0)
    out = stats_ptr + slot * STAT_FIELDS
    tl.store(out, top)
    tl.store(out + 1, tl.sum(e, axis=0))
    tl.store(out + 2, tl.sum(e * expm1(x, largest), axis=0))
    tl.store(out + 3, tl.sum(d * d, axis=0))
    tl.store(out + 4, tl.sum(b * b, axis=0))
    tl.store(out + 5, tl.sum(b * d, axis=0))
    tl.store(out + 6, largest)


@triton.jit
def _store_scan(
    b, d, mask, slot, counted, head, inv_tau, heads_ptr, carry_ptr, stats_ptr, scans_ptr, EXTRA: tl.constexpr, FULL: tl.constexpr,
):
    """One tile's sum of abs(CDF difference) times Z_T, and with EXTRA the sums behind KL, JS and cosine."""
    largest = tl.load(stats_ptr + slot * STAT_FIELDS + 6)  # of pass A: no reduction before the branch
    table = heads_ptr + head * HEAD_FIELDS
    top, r, inv_growth = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    e = tl.exp2(tl.fma(b, inv_tau * LOG2E, -top))
    if not FULL:
        e = tl.where(mask, e, 0.0)
    moved = expm1(d * inv_tau, largest) - r
    change = e * moved
    steps = tl.abs(tl.cumsum(change, axis=0) + tl.load(carry_ptr + slot))
    if not FULL:
        steps = tl.where(counted, steps, 0.0)
    out = scans_ptr + slot * SCAN_FIELDS
    tl.store(out, tl.sum(steps, axis=0))
    if EXTRA:
        # P_T / P_B = exp(x) / (1 + r), and r is a mean of the head's expm1(x)
        kl, js = divergences(e, moved * inv_growth, tl.maximum(largest, tl.abs(r)))
        tl.store(out + 1, tl.sum(kl, axis=0))
        tl.store(out + 2, tl.sum(js, axis=0))
        tl.store(out + 3, tl.sum(e * e, axis=0))
        tl.store(out + 4, tl.sum(e * change, axis=0))
        tl.store(out + 5, tl.sum(change * change, axis=0))


@triton.jit
def head_delta_stats_kernel(
    tiles_ptr, segments_ptr, stats_ptr, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Pass A: statistics of every tile of every head, from one read of both models.

    Program w owns tile w of the work list: BLOCK elements of one segment of one head.

        top = max b log2(e) / tau;  e = exp(b / tau) / 2^top;  u = expm1((t - b) / tau)
        sums of e, e u, (t - b)^2, b^2, b (t - b);  max abs((t - b) / tau)

    Shapes     tiles [n_tiles, 5], segments [n, 8] int64; stats [n_slots, 8] float32
    Dtypes     weights fp32/fp16/bf16; arithmetic and sums fp32, at most BLOCK terms each
    Scalars    inv_tau = 1 / tau
    Untouched  slots without a tile keep what the host wrote: -inf and zeros
    Bytes      one read of each weight: 4 per pair of bf16 weights, 8 of fp32
    """
    row = tiles_ptr + tl.program_id(0).to(tl.int64) * TILE_FIELDS
    b, d, count, slot = _load_pair(row, segments_ptr, BASE, TASK, FLAT, FULL, BLOCK)
    _store_stats(b, d, tl.arange(0, BLOCK) < count, slot, inv_tau, stats_ptr, FULL)


@triton.jit
def head_delta_scan_kernel(
    tiles_ptr, segments_ptr, heads_ptr, carry_ptr, stats_ptr, scans_ptr, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, FLAT: tl.constexpr, FULL: tl.constexpr, EXTRA: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):
    """Pass B: the distribution functions' difference, tile by tile from carries of pass A.

    Program w owns tile n - 1 - w of the n of the work list: what pass A read last is still in L2.

        change_i = e_i (u_i - r) = (P_T - P_B)_i Z_T;  cdf_i = carry + sum_{j <= i} change_j
        sum of abs(cdf_i), the head's last element left out

    Shapes     heads [n_heads, 4] (top, r, 1 / (1 + r)) float32; carry [n_slots], stats [n_slots, 8] float32;
               scans [n_slots, 8] float32; SLOTS slots a head
    Dtypes     weights fp32/fp16/bf16; arithmetic fp32; carries come from float64 sums
    Scalars    inv_tau = 1 / tau
    Untouched  slots without a tile stay zero
    Bytes      a second read of each weight: 4 per pair of bf16 weights, 8 of fp32
    """
    row = tiles_ptr + (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * TILE_FIELDS
    b, d, count, slot = _load_pair(row, segments_ptr, BASE, TASK, FLAT, FULL, BLOCK)
    offs = tl.arange(0, BLOCK)
    counted = offs < count - tl.load(row + 4)  # all but a head's last element, where both CDFs are 1
    _store_scan(b, d, offs < count, slot, counted, slot // SLOTS, inv_tau,
                heads_ptr, carry_ptr, stats_ptr, scans_ptr, EXTRA, FULL)


@triton.jit
def _form_projection(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt, SLOTS: tl.constexpr,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):
    """ROWS rows of W_h = q^T M and of its change dq^T M_T + q^T dM, row-major [ROWS * V_PAD]."""
    head, tile = tl.program_id(0), tl.program_id(1)
    entry = heads_ptr + head.to(tl.int64) * 3
    qb_ptr = tl.load(entry).to(tl.pointer_type(BASE))
    qt_ptr = tl.load(entry + 1).to(tl.pointer_type(TASK))
    group = tl.load(entry + 2)
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
    n: tl.constexpr = ROWS * V_PAD
    slot = head.to(tl.int64) * SLOTS + tile
    return tl.reshape(w, (n,)), tl.reshape(dw, (n,)), tl.reshape(mask, (n,)), tl.reshape(counted, (n,)), slot, head


@triton.jit
def projection_stats_kernel(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, stats_ptr, d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
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
    w, dw, mask, _, slot, _ = _form_projection(
        heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt, SLOTS,
        BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
    _store_stats(w, dw, mask, slot, inv_tau, stats_ptr, False)


@triton.jit
def projection_scan_kernel(
    heads_ptr, mb_ptr, mt_ptr, md_ptr, table_ptr, carry_ptr, stats_ptr, scans_ptr, d_model, stride_qb, stride_qt, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    V_PAD: tl.constexpr, ROWS: tl.constexpr, K_BLOCK: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr, EXTRA: tl.constexpr,
):
    """Pass B over W_h: as `head_delta_scan_kernel`, on the tiles of `projection_stats_kernel`.

    Shapes     table [n_heads, 4], carry [n_slots], stats and scans [n_slots, 8] float32
    Bytes      a second read of q of both models
    """
    w, dw, mask, counted, slot, head = _form_projection(
        heads_ptr, mb_ptr, mt_ptr, md_ptr, d_model, stride_qb, stride_qt, SLOTS,
        BASE, TASK, D_K, D_V, V_PAD, ROWS, K_BLOCK, PRECISION)
    _store_scan(w, dw, mask, slot, counted, head, inv_tau, table_ptr, carry_ptr, stats_ptr, scans_ptr, EXTRA, False)
