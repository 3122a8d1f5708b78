"""Both passes of `head_delta` over W_h = q_h^T M_g with M_g = k_g v_g^T, formed in registers and never stored.

Products run on tensor cores, which multiply bfloat16: a float32 is a sum of three of them, its pieces, and a product
is that of all pairs of pieces but those below 2^-25 of it. The cores may cut off what they add (to 24 bits), so that
each block of the inner dimension has a sum of its own, its smallest products first.
"""

import triton
import triton.language as tl

from .delta_heads import SUM_FIELDS, load_head, load_listed, store_sums
from .delta_sums import (
    STAT_FIELDS, add_each, add_squares, each, farthest, first_and_second, largest, scan, scanned, store_stats,
    to_lanes, weigh, zeros,
)
from .series import TAYLOR

PIECES = tl.constexpr(3)
TILE_ROWS = tl.constexpr(16)  # of W, that share a row of statistics
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # Triton's interpreter has no products of bfloat16


@triton.jit
def _pieces(x, N: tl.constexpr):
    """N bfloat16 whose sum is float32 x, to 2^-(8 N + 1); the largest first, each the nearest to what is left."""
    pieces = ()
    for _ in tl.static_range(N - 1):
        piece = ((x.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)
        pieces, x = pieces + (piece.to(tl.bfloat16),), x - piece
    return pieces + (x.to(tl.bfloat16),)


@triton.jit
def _weights(x):
    """Pieces of stored weights."""
    if x.dtype == tl.bfloat16:
        return (x,)
    else:
        return _pieces(x.to(tl.float32), 2 if x.dtype == tl.float16 else PIECES)


@triton.jit
def _changes(base, task):
    """Pieces of differences. Of two bfloat16 two are exact: far apart they are these themselves."""
    d = task.to(tl.float32) - base.to(tl.float32)
    return _pieces(d, 2 if base.dtype == tl.bfloat16 and task.dtype == tl.bfloat16 else PIECES)


@triton.jit
def _transposed(pieces):
    turned = ()
    for i in tl.static_range(len(pieces)):
        turned = turned + (tl.trans(pieces[i]),)
    return turned


@triton.jit
def _multiply(x, left, right, DEGREE: tl.constexpr):
    """x and the products of all pieces left[i], right[DEGREE - i]."""
    for i in tl.static_range(len(left)):
        if i <= DEGREE and DEGREE - i < len(right):
            a, b = left[i], right[DEGREE - i]
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            x = tl.dot(a, b, x)
    return x


@triton.jit
def _product(x, left, right, more_left, more_right):
    """left right + more_left more_right, float32, of pieces, the smallest products first; x is zero."""
    for i in tl.static_range(PIECES):
        x = _multiply(x, left, right, PIECES - 1 - i)
        x = _multiply(x, more_left, more_right, PIECES - 1 - i)
    return x


@triton.jit
def _add(total, lost, x):
    """total + x and what rounding has taken from all such sums, to be added to the next x (Kahan)."""
    x += lost
    new = total + x
    return new, x - (new - total)


@triton.jit
def _load_rows(ptr, row, col, ROWS: tl.constexpr, COLS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """[N, M] weights of a matrix [ROWS, COLS]; zeros outside."""
    row, col = (row + tl.arange(0, N)).to(tl.int64)[:, None], (col + tl.arange(0, M))[None, :]
    return tl.load(ptr + row * COLS + col, mask=(row < ROWS) & (col < COLS), other=0.0)


@triton.jit
def group_products_kernel(
    bases_ptr, tasks_ptr, products_ptr,
    BASE: tl.constexpr, TASK: tl.constexpr, ALIGN: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, INNER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_BLOCK: tl.constexpr,
):
    """M_B = k_B v_B^T and dM = dk v_T^T + k_B dv^T of a group, in pieces.

    A program owns ROWS rows and COLS columns of a group. A difference of products is never taken. Columns are stored
    so that a thread that holds columns 2 t and 2 t + 1 of every 8 of a product, as tensor cores give them, has
    neighbours: see `_halves_of_tiles`, which puts them in order.

    Shapes     bases, tasks [groups, 2] int64: addresses of k [D_K, INNER] and v [D_V, INNER];
               products [groups, 2, 3, K_PAD, V_PAD] bfloat16: pieces of M_B and of dM, zeros beyond D_K and D_V
    Dtypes     weights fp32/fp16/bf16; products of bfloat16 pieces accumulate in fp32
    Scalars    ALIGN divides all addresses
    Untouched  nothing
    Bytes      one read of k and v of both models, from L2 for each block; one write of products
    """
    in_row, blocks = tl.cdiv(V_PAD, COLS), tl.cdiv(K_PAD, ROWS) * tl.cdiv(V_PAD, COLS)
    group, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    row, col = block // in_row * ROWS, block % in_row * COLS
    kb_ptr = tl.multiple_of(tl.load(bases_ptr + group * 2).to(tl.pointer_type(BASE)), ALIGN)
    vb_ptr = tl.multiple_of(tl.load(bases_ptr + group * 2 + 1).to(tl.pointer_type(BASE)), ALIGN)
    kt_ptr = tl.multiple_of(tl.load(tasks_ptr + group * 2).to(tl.pointer_type(TASK)), ALIGN)
    vt_ptr = tl.multiple_of(tl.load(tasks_ptr + group * 2 + 1).to(tl.pointer_type(TASK)), ALIGN)
    zero = tl.zeros((ROWS, COLS), tl.float32)
    m, m_lost, dm, dm_lost = zero, zero, zero, zero
    for d in range(0, INNER, D_BLOCK):
        kb, kt = (_load_rows(kb_ptr, row, d, D_K, INNER, ROWS, D_BLOCK),
                  _load_rows(kt_ptr, row, d, D_K, INNER, ROWS, D_BLOCK))
        vb, vt = (_load_rows(vb_ptr, col, d, D_V, INNER, COLS, D_BLOCK),
                  _load_rows(vt_ptr, col, d, D_V, INNER, COLS, D_BLOCK))
        m, m_lost = _add(m, m_lost, _product(zero, _weights(kb), _transposed(_weights(vb)), (), ()))
        dm, dm_lost = _add(dm, dm_lost, _product(
            zero, _changes(kb, kt), _transposed(_weights(vt)), _weights(kb), _transposed(_changes(vb, vt))))
    GROUP: tl.constexpr = V_PAD if V_PAD < 64 else 64
    rows, cols = row + tl.arange(0, ROWS)[:, None], col + tl.arange(0, COLS)[None, :]
    own = cols % (GROUP // 4)
    at = cols // GROUP * GROUP + own // 2 * 8 + cols % GROUP // (GROUP // 4) * 2 + own % 2
    out = products_ptr + group * (2 * PIECES * K_PAD * V_PAD) + (rows * V_PAD + at)
    pieces = _pieces(m, PIECES) + _pieces(dm, PIECES)
    for i in tl.static_range(2 * PIECES):
        tl.store(out + i * (K_PAD * V_PAD), pieces[i], mask=rows < K_PAD)


@triton.jit
def _products(ptr, k, FIRST: tl.constexpr, K_PAD: tl.constexpr, V_PAD: tl.constexpr, K_BLOCK: tl.constexpr):
    """Pieces FIRST .. FIRST + 3 of a group's products, K_BLOCK rows of them."""
    pieces = ()
    ptr = ptr + k * V_PAD + (tl.arange(0, K_BLOCK)[:, None] * V_PAD + tl.arange(0, V_PAD)[None, :])
    for i in tl.static_range(FIRST, FIRST + PIECES):
        pieces = pieces + (tl.load(ptr + i * (K_PAD * V_PAD)),)
    return pieces


@triton.jit
def _load_q(ptr, k, rows, d_model, D_K: tl.constexpr, K_BLOCK: tl.constexpr):
    """K_BLOCK rows of q [D_K, d_model] from k on, of them the columns that are these rows of W; zeros outside."""
    row, stride = tl.arange(0, K_BLOCK)[:, None], tl.cast(d_model, tl.int64)
    inside = (rows[None, :] < d_model) & (k + row < D_K) if D_K % K_BLOCK else rows[None, :] < d_model
    return tl.load(ptr + k * stride + (row * stride + rows[None, :]), mask=inside, other=0.0)


@triton.jit
def _form(
    head, tiles, bases_ptr, tasks_ptr, groups_ptr, products_ptr, d_model,
    BASE: tl.constexpr, TASK: tl.constexpr, ALIGN: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, RUNS: tl.constexpr, K_BLOCK: tl.constexpr,
):
    """Tiles of W_h = q_B^T M_B and of its change dq^T M_B + q_T^T dM, columns in the order of the stored products."""
    qb_ptr = tl.multiple_of(tl.load(bases_ptr + head).to(tl.pointer_type(BASE)), ALIGN)
    qt_ptr = tl.multiple_of(tl.load(tasks_ptr + head).to(tl.pointer_type(TASK)), ALIGN)
    products_ptr += tl.load(groups_ptr + head) * (2 * PIECES * K_PAD * V_PAD)
    rows = to_lanes(tiles, RUNS * TILE_ROWS, RUNS) * TILE_ROWS + tl.arange(0, RUNS * TILE_ROWS) % TILE_ROWS
    rows = tl.max_contiguous(tl.multiple_of(rows, TILE_ROWS), TILE_ROWS)
    zero = tl.zeros((RUNS * TILE_ROWS, V_PAD), tl.float32)
    w, dw = zero, zero
    for k in range(0, D_K, K_BLOCK):
        qb, qt = _load_q(qb_ptr, k, rows, d_model, D_K, K_BLOCK), _load_q(qt_ptr, k, rows, d_model, D_K, K_BLOCK)
        m = _products(products_ptr, k, 0, K_PAD, V_PAD, K_BLOCK)
        w += _product(zero, _transposed(_weights(qb)), m, (), ())
        dw += _product(zero, _transposed(_changes(qb, qt)), m,
                       _transposed(_weights(qt)), _products(products_ptr, k, PIECES, K_PAD, V_PAD, K_BLOCK))
    return w, dw


@triton.jit
def _chunks(w, dw, tiles, d_model, D_V: tl.constexpr, RUNS: tl.constexpr):
    """As `weigh` takes them: the upper halves of all tiles, then the lower ones.

    Of each, the first and the second 8 of the 16 neighbours of a lane: w, dw and what is there; what is behind them.
    """
    ROWS: tl.constexpr = TILE_ROWS // 2
    V_PAD: tl.constexpr = w.shape[1]
    LANES: tl.constexpr = RUNS * ROWS * V_PAD // 16
    first = tl.arange(0, LANES) * 16 % (ROWS * V_PAD)
    col, start = first % V_PAD, to_lanes(tiles, LANES, RUNS) * TILE_ROWS
    chunks, w, dw = (), _halves_of_tiles(w, RUNS), _halves_of_tiles(dw, RUNS)
    for i in tl.static_range(2):
        row = i * ROWS + first // V_PAD
        behind = tl.minimum(d_model - start, TILE_ROWS) * D_V - row * D_V - col - 16
        b0, b1 = first_and_second(w[i])
        d0, d1 = first_and_second(dw[i])
        in_row, cols = (start + row < d_model)[:, None], col[:, None] + tl.arange(0, 8)[None, :]
        chunks = chunks + ((b0, d0, in_row & (cols < D_V)), (b1, d1, in_row & (cols + 8 < D_V)), behind)
    return chunks


@triton.jit
def _halves_of_tiles(x, RUNS: tl.constexpr):
    """Rows 0 .. 7 and rows 8 .. 15 of each tile, columns put in order; 16 neighbours lie in a thread, nothing moves."""
    V_PAD: tl.constexpr = x.shape[1]
    GROUP: tl.constexpr = V_PAD if V_PAD < 64 else 64
    x = tl.reshape(x, (RUNS, 2, TILE_ROWS // 2, V_PAD // GROUP, GROUP // 8, 4, 2))
    x = tl.permute(x, (0, 2, 3, 5, 4, 6, 1))
    return tl.split(tl.reshape(x, (RUNS * TILE_ROWS // 2, V_PAD, 2)))


@triton.jit
def projection_stats_kernel(
    bases_ptr, tasks_ptr, groups_ptr, products_ptr, stats_ptr, d_model, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, ALIGN: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, RUNS: tl.constexpr, K_BLOCK: tl.constexpr, MASKED: tl.constexpr,
    WIDTH: tl.constexpr, ALL: tl.constexpr,
):
    """Pass A over W_h: as `head_delta_stats_kernel`, whose tiles are TILE_ROWS rows of W, [d_model, D_V].

    A program forms RUNS tiles of a head. Those of a head and the heads of a group follow one another, so that the
    group's products stay in L2.

    Shapes     of each head, int64: bases and tasks, the addresses of its q [D_K, d_model], and groups; products as
               `group_products_kernel` wrote them; stats [heads * tiles, 18], see `store_stats`
    Dtypes     q fp32/fp16/bf16; products of bfloat16 pieces accumulate in fp32
    Scalars    inv_tau = 1 / tau; not MASKED: RUNS tiles divide W
    Untouched  of a row of stats what only ALL metrics need
    Bytes      one read of q of both models; of products for each program, from L2
    """
    count = tl.cdiv(d_model, TILE_ROWS)
    programs = tl.cdiv(count, RUNS)
    head, tiles = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * RUNS + each(RUNS)
    w, dw = _form(head, tiles, bases_ptr, tasks_ptr, groups_ptr, products_ptr, d_model,
                  BASE, TASK, ALIGN, D_K, D_V, K_PAD, V_PAD, RUNS, K_BLOCK)
    chunks = _chunks(w, dw, tiles, d_model, D_V, RUNS)
    out, stored = stats_ptr + (head * count + tiles) * STAT_FIELDS, tiles < count
    squares = zeros(1, chunks[2].shape[0], WIDTH)[0]
    for i in tl.static_range(2):
        squares = add_squares(squares, chunks[3 * i], chunks[3 * i + 1])
    if largest(farthest(squares, inv_tau, RUNS), RUNS) > TAYLOR:
        _store_stats(out, stored, chunks, squares, inv_tau, RUNS, MASKED, ALL, True)
    else:
        _store_stats(out, stored, chunks, squares, inv_tau, RUNS, MASKED, ALL, False)


@triton.jit
def _store_stats(out, stored, chunks, squares, inv_tau, RUNS: tl.constexpr, MASKED: tl.constexpr,
                 ALL: tl.constexpr, EXACT: tl.constexpr):
    sums, pieces = zeros(8 if ALL else 0, squares.shape[0], squares.shape[1]), ()
    for i in tl.static_range(2):
        piece, sums = weigh(chunks[3 * i], chunks[3 * i + 1], chunks[3 * i + 2], inv_tau, sums, MASKED, ALL, EXACT)
        pieces = pieces + (piece,)
    store_stats(out, stored, pieces, squares, sums, inv_tau, RUNS)


@triton.jit
def _scan(chunks, carry, counted, r, inv_tau, RUNS: tl.constexpr, EXACT: tl.constexpr):
    LANES: tl.constexpr = chunks[2].shape[0]
    sums = zeros(6 if EXACT else 1, LANES, 0)
    for i in tl.static_range(2):
        carry, sums = scan(chunks[3 * i], chunks[3 * i + 1], carry, r, inv_tau, sums, RUNS, True, EXACT)
    return scanned(sums, to_lanes(counted, LANES, RUNS))


@triton.jit
def projection_scan_kernel(
    bases_ptr, tasks_ptr, groups_ptr, products_ptr, list_ptr, carries_ptr, heads_ptr, sums_ptr, slots,
    d_model, inv_tau,
    BASE: tl.constexpr, TASK: tl.constexpr, ALIGN: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, RUNS: tl.constexpr, K_BLOCK: tl.constexpr,
):
    """Pass B over W_h: as `head_delta_scan_kernel`; RUNS listed tiles, wherever they lie, are one product.

    Bytes      another read of q of both models for each tile that is listed
    """
    head, first = tl.program_id(0).to(tl.int64), tl.program_id(0).to(tl.int64) * slots
    r, listed = load_head(heads_ptr, head)
    sums, i = scanned((), True), tl.program_id(1) * RUNS
    while i < listed:
        tile, mine, exact, carry = load_listed(
            list_ptr, carries_ptr, first, i + each(RUNS), listed, first, first + slots)
        tiles = tl.where(mine, tile, d_model).to(tl.int32)
        w, dw = _form(head, tiles, bases_ptr, tasks_ptr, groups_ptr, products_ptr, d_model,
                      BASE, TASK, ALIGN, D_K, D_V, K_PAD, V_PAD, RUNS, K_BLOCK)
        chunks = _chunks(w, dw, tiles, d_model, D_V, RUNS)
        if largest(exact.to(tl.int32), RUNS) > 0:
            more = _scan(chunks, carry, exact, r, inv_tau, RUNS, True)
        else:
            more = _scan(chunks, carry, exact, r, inv_tau, RUNS, False)
        sums = add_each(sums, more)
        i += tl.num_programs(1) * RUNS
    store_sums(sums_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head) * SUM_FIELDS, sums)
