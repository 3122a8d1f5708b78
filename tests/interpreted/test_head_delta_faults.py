"""Every fault planted in the scoring kernels turns the check that is named beside it red."""

from functools import partial

import pytest
import torch

from alps_kernels.ops import Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import cpu, projection, tables as delta_tables
from tests.interpreted import test_head_delta_kernel as checks, test_head_projection_kernel as products
from tests.interpreted.test_head_delta_kernel import SUMMED, close, segment, small_tiles  # noqa: F401, the fixture
from tests.ops.delta_cases import projection_layer
from tests.ops.delta_oracle import projection_oracle, stored_oracle
from tests.support.mutants import plant, plant_kernel

HEADS, KERNELS, SUMS, PROJECTION, SERIES = (
    f"{name}.py" for name in ("delta_heads", "head_delta", "delta_sums", "head_projection", "series"))
TABLES, HOST = delta_tables, projection


def scored(*layer, metrics=SUMMED, tau=1.0):
    """A check: one layer, by the kernels and by long doubles."""
    def check():
        close(head_delta([layer], metrics, temperature=tau, backend="triton"), stored_oracle([layer], tau), metrics)
    return check


def dip(lane, ahead, rest=None, back=None):
    """A head of three flat tiles, the second entered and, unless `back`, left with the CDF difference `ahead`."""
    d = torch.full((3, 128), sum(lane) / 16 if rest is None else rest)
    d[0, 0] += ahead
    d[2, -1] += -ahead if back is None else back
    d[1] = torch.tensor(lane).repeat(8)
    return scored(Segment(torch.zeros(1, 3, 128), 1e-3 * d[None], (0,)), metrics=["pad"])


def few_programs(check):
    def sized():
        with pytest.MonkeyPatch.context() as patch:
            checks.resize(patch, checks.SIDE_BY_SIDE)
            check()
    return sized


def mixed():
    with pytest.MonkeyPatch.context() as patch:
        checks.test_near_and_far_tiles_side_by_side({**checks.SMALL, "RUNS": 64}, patch)


def projected(layer, tau=1.0, metrics=("pad",)):
    def check():
        found = head_delta_projection([layer], metrics, temperature=tau, backend="triton")
        close(found, projection_oracle([layer], tau), metrics)
    return check


def formed(check, **given):
    """A check of W and dW as the kernels that are launched form them."""
    def planted():
        module = projection.device_code("head_projection")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_form", module._form)
            patch.setattr(products, "_chunks", module._chunks)
            check(monkeypatch=patch, **given)
    return planted


def float32(dtype):
    return formed(products.test_projection_forms_products_and_heads_to_float32, dtypes=(dtype,), hopper=False, unset_is_nan=None)


def unset_is_nan(check):
    def filled():
        torch.use_deterministic_algorithms(True)  # torch.empty is full of NaN
        try:
            check()
        finally:
            torch.use_deterministic_algorithms(False)
    return filled


near = scored(segment(1, 16, 40, delta=2.5e-3))  # five flat tiles of two chunks each; within the short series
pad = scored(segment(1, 16, 40), metrics=["pad"])
many = few_programs(scored(segment(1, 64, 128), metrics=["pad"]))  # 64 tiles, of which few are listed
pairs = scored(segment(1, 16, 40, dtype=torch.bfloat16), metrics=["pad"])
tail = scored(segment(1, 5, 72))  # two tiles a row; a program takes four rows
chunks = scored(segment(1, 5, 72), segment(1, 16, 40), metrics=["pad"])
far = scored(segment(1, 8, 32, delta=0.06))
warm = scored(segment(1, 16, 64, delta=2e-4), metrics=["pad", "kl"], tau=0.06)
hot = scored(segment(1, 16, 64, delta=1.5e-3), metrics=["pad", "kl"], tau=0.06)
grouped = scored(segment(2, 8, 32), segment(2, 8, 32, (1, 0), seed=1), segment(1, 4, 20, (0, 0), seed=2), metrics=["pad"])
two_kinds = scored(segment(2, 1, 48), segment(2, 2, 64, seed=1), metrics=["pad"])
base, task = checks.pair((1, 16, 40), delta=2e-5)
shifted = scored(Segment(base, task + 1e-3, (0,)), metrics=["kl", "js"])
layers = checks.test_grouped_heads_several_segments_and_layers_of_other_shapes
strides = checks.test_each_model_has_strides_of_its_own
project = partial(products.test_projection_equals_the_oracle, 20, 24, 33)
tall = projected(projection_layer(16, 16, 320, scale=1.0, delta=1e-3))
far_beside_near = projected(products.far_changes(torch.float32), metrics=SUMMED)
hot_projection = projected(projection_layer(16, 16, 40, delta=3e-3, scale=2.0), tau=0.06, metrics=["pad", "kl"])
warm_projection = partial(products.test_projection_at_other_temperatures, 0.5)
bf16, fp16, fp32 = float32(torch.bfloat16), float32(torch.float16), float32(torch.float32)
long_sums = formed(products.test_small_products_add_up_beside_a_large_one)
gaps = partial(products.test_projection_reads_views_and_nothing_around_them, products.in_gaps, products.in_gaps)
many_groups = projected(projection_layer(16, 16, 24, heads=4, groups=2))
heavy = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
heavy[0, ::2, ::10] = 14.0
lower = heavy + 1e-3 * torch.randn(heavy.shape, generator=torch.Generator().manual_seed(1))
lower[0, ::2, ::10] -= 7.9
together = scored(Segment(heavy, lower, (0,)), metrics=["kl", "cosine"])

PRODUCTS = "(b, d, u, u, u * u, e, a, a)"  # with these, sums of b^2, b d, e u^2 and so on
FACTORS = PRODUCTS[1:-1].split(", ")
FAULTS = {
    # pass A
    **{f"sum {i} of pass A": (SUMS, PRODUCTS, f"({', '.join([*FACTORS[:i], f'2.0 * ({x})', *FACTORS[i + 1:]])})", near)
       for i, x in enumerate(FACTORS)},
    "squares of the first halves of lanes alone": (SUMS, "left[1], left[1]), right[1], right[1])", "left[1], left[1]), right[1], left[1])", near),
    "a piece is cut off": (PROJECTION, "+ 32768) &", "+ 0) &", formed(products.test_two_pieces_hold_any_change)),
    "odd before even": (KERNELS, "tl.join(even, odd)", "tl.join(odd, even)", pairs),
    "even for odd": (KERNELS, "(pair & -65536)", "(pair << 16)", pairs),
    "the behind count of pass A": (KERNELS, "- 16 - chunk - lane", "- 15 - chunk - lane", many),
    "the behind count of a tail": (KERNELS, "(TILE if FLAT else to_lanes(n, lane.shape[0], RUNS))", "TILE", tail),
    "the behind count of a projection": (PROJECTION, "- col - 16\n", "- col - 15\n", tall),
    "a lane's second half counts as its first": (SUMS, "tl.fma(e0, 8.0, e_line0", "tl.fma(e0, 7.0, e_line0", many),
    "moves of a lane's second half count as its first": (SUMS, "tl.fma(a0, 8.0, a_line0", "tl.fma(a0, 7.0, a_line0", many),
    "moves are not weighted": (SUMS, "    a = e * u\n", "    a = u\n", pad),
    "the task's row stride is the base's": (KERNELS, "run * task_row", "run * base_row", strides),
    "the base's row stride is the task's": (KERNELS, "run * base_row", "run * task_row", strides),
    "a column stride is 1": (KERNELS, "col * task_col", "col", checks.test_transposed_views_are_read_in_their_own_order),
    "a tile starts at its row's first column": (KERNELS, "run, start, n,\n", "run, start * 0, n,\n", chunks),
    "a masked element counts": (SUMS, "tl.where(there, e, 0.0) if MASKED else e", "e", tail),
    "a bound that bounds nothing": (SUMS, "RUNS)) * inv_tau\n", "RUNS)) * 0.0\n", far),
    "far statistics are not written": (KERNELS, "largest(far, RUNS) > TAYLOR", "largest(far, RUNS) > 1e9", far),
    "far statistics are those of the short series": (KERNELS, "RUNS, FLAT, ALL, True)", "RUNS, FLAT, ALL, False)", far),
    # the bound of what a tile's CDF difference strays from a line
    "the bound without its slope": (SUMS, "tl.fma(tl.abs(slope), e, tl.abs(ahead) + most)", "tl.abs(ahead) + most",
                                    dip([-1.0] * 4 + [2.0] * 4 + [0.0] * 8, 4.5)),
    "the bound without what is in lanes": (SUMS, "tl.abs(ahead) + most)", "tl.abs(ahead))", dip([-1.0] * 8 + [1.0] * 8, 4.0)),
    "a lane's first half alone is bounded": (SUMS, "tl.maximum(most0, tl.abs(a0) + most1)", "most0",
                                          dip([0.0] * 8 + [-1.0] * 4 + [1.0] * 4, 3.0)),
    "a tenth of the bound": (HEADS, "bridge * 1.00001", "bridge * 0.1", dip([-1.0] * 8 + [1.0] * 8, 4.0)),
    # between the passes
    "the carry between tiles is lost": (HEADS, "carry += tl.sum(change, axis=0)", "carry += 0.0", pad),
    "carries include their own tile": (HEADS, "before = after - change", "before = after", many),
    "the carry of pass B is lost": (HEADS, "carry = tl.load(carries_ptr + place + entry,", "carry = 0.0 * tl.load(carries_ptr + place + entry,", many),
    "a sign change is not seen": (HEADS, "(before * after < 0.0)", "(before * after < -1e9)", dip([-1.0] * 16, 64.0, 0.0, 64.0)),
    "tiles are listed one place late": (HEADS, "needed.to(tl.int64), axis=0) - 1", "needed.to(tl.int64), axis=0)", many),
    "the listed count is one short": (HEADS, "listed.to(tl.float64)", "(listed - 1).to(tl.float64)", many),
    "the row of a listed tile is the next": (HEADS, "((row + slot) * 2 + exact)", "((row + slot + 1) * 2 + exact)", many),
    "a matrix's last tile is not seen": (HEADS, "there, stats = slot < tiles,", "there, stats = slot < tiles - 1,", many),
    "tiles beyond SLOTS are not seen": (HEADS, "            at += SLOTS\n        read += 1\n    out", "            at += tiles\n        read += 1\n    out", pad),
    "the list of each slot of tiles begins anew": (HEADS, "listed += tl.sum(needed", "listed = tl.sum(needed", pad),
    "pass B need not be exact": (HEADS, "* 2 + exact)", "* 2)", far),
    "any change is near": (HEADS, "there & (farthest > near)", "there & (farthest > 1e9)", far),
    "every tail is a whole tile": (HEADS, "tl.minimum(run - (slot % of_run) * tile, tile)", "tile", tail),
    "every row has one tile": (HEADS, "(slot % of_run) * tile", "slot * tile", tail),
    "the mean shift is forgotten in steps": (HEADS, "a_line - r * e_line", "a_line", many),
    "cancelled squares pass": (HEADS, "r * r * z_all > LOST", "r * r * z_all > 1e9", shifted),
    "near tiles beside exact ones count twice": (SUMS, "tl.where(counted, sums[i], 0.0)", "sums[i]", mixed),
    "another kind's tiles are taken, behind": (HEADS, "& (item // 2 < end)", "", two_kinds),
    "another kind's tiles are taken, ahead": (HEADS, "(item // 2 >= first) & ", "", two_kinds),
    # pass B
    "the carry between chunks is lost": (SUMS, "return carry + sum_lanes(whole, RUNS), new", "return carry, new", pad),
    "a lane's second half starts where its first does": (SUMS, "before + half, right", "before, right", pad),
    "a lane's changes come twice": (SUMS, "_ahead(whole, RUNS)\n", "_ahead(whole, RUNS) + whole\n", pad),
    "the mean shift is forgotten in pass B": (SUMS, "expm1_less(d, r, inv_tau, EXACT)", "expm1_less(d, 0.0, inv_tau, EXACT)", pad),
    "masked steps count": (SUMS, "tl.where(is_there[i], step, 0.0) if MASKED else step", "step", tail),
    "a lane's prefix sums stay a weight's": (SUMS, "(sums[i - 1] + each[i],)", "(each[i],)", near),
    "a program takes the others' tiles": (KERNELS, "i += tl.num_programs(1) * RUNS", "i += RUNS", pad),
    # temperature
    "temperature is ignored in e": (SUMS, "b * (inv_tau * LOG2E)", "b * LOG2E", warm),
    "temperature twice in e": (SUMS, "b * (inv_tau * LOG2E)", "b * (inv_tau * inv_tau * LOG2E)", warm),
    "temperature is ignored in the changes of pass A": (SUMS, "expm1_less(d, 0.0, inv_tau", "expm1_less(d, 0.0, 1.0", warm),
    "temperature is ignored in the changes of pass B": (SUMS, "expm1_less(d, r, inv_tau, EXACT)", "expm1_less(d, r, 1.0, EXACT)", warm),
    "temperature is ignored in what is far": (SUMS, "RUNS)) * inv_tau\n", "RUNS))\n", hot),
    "the square of the short expm1": (SERIES, "inv_tau * inv_tau * 0.5,", "inv_tau * 0.5,", warm),
    "temperature twice": (TABLES, "*kind.strides, 1 / tau", "*kind.strides, 1 / tau / tau", warm),
    "temperature twice in pass A of a projection": (HOST, "t.stats, d_model, 1 / tau,", "t.stats, d_model, 1 / tau / tau,", warm_projection),
    "temperature twice in pass B of a projection": (HOST, "*t.of_scan(0), d_model, 1 / tau,", "*t.of_scan(0), d_model, 1 / tau / tau,", warm_projection),
    # heads and groups
    "one group for all": (TABLES, "columns.append([len(bases) + place for", "columns.append([len(bases) + places[0] for", grouped),
    "matrices in memory's order": (TABLES, "addresses(s.task, read)", "addresses(s.task, range(len(read)))", grouped),
    "places of a segment after the other": (TABLES, "chain(*zip(*columns, strict=True))", "chain(*columns)", grouped),
    "kinds in the wrong order": (TABLES, "kinds * count", "kinds[::-1] * count", grouped),
    "layers share their places": (TABLES, "[len(bases) + place for", "[place for", layers),
    "layers share their groups": (HOST, "len(groups[0]) // 2 + pairs[pair]", "pairs[pair]", project),
    "k of a group, v of the first": (HOST, "[pair[i] for pair in pairs]", "[pair[i] * (1 - i) for pair in pairs]", many_groups),
    "heads take their groups in turn": (HOST, "+ pairs[pair] for pair in zip(k.index, v.index, strict=True))", "+ i % len(pairs) for i in range(len(k.index)))", many_groups),
    "k and v change places": (HOST, "enumerate(sides[1:])", "enumerate(sides[:0:-1])", many_groups),
    "one group for all heads of a projection": (PROJECTION, "tl.load(groups_ptr + head)", "tl.load(groups_ptr)", many_groups),
    # group products
    "change of k is left out": (PROJECTION, "zero, _changes(kb, kt), _transposed(_weights(vt)), ", "zero, (), (), ", bf16),
    "change of v is left out": (PROJECTION, "_weights(kb), _transposed(_changes(vb, vt))))", "(), ()))", bf16),
    "change of k meets the base's v": (PROJECTION, "_transposed(_weights(vt)), _weights(kb)", "_transposed(_weights(vb)), _weights(kb)", bf16),
    "change of v meets the task's k": (PROJECTION, "_transposed(_weights(vt)), _weights(kb)", "_transposed(_weights(vt)), _weights(kt)", bf16),
    "the last block of d_model is lost": (PROJECTION, "range(0, INNER, D_BLOCK)", "range(0, INNER - D_BLOCK, D_BLOCK)", bf16),
    "rows beyond d_k are read": (PROJECTION, "mask=(row < ROWS) & (col < COLS)", "mask=col < COLS", gaps),
    "columns beyond d_model are read": (PROJECTION, "mask=(row < ROWS) & (col < COLS)", "mask=row < ROWS", gaps),
    "what rounding took is lost": (PROJECTION, "    x += lost\n", "", long_sums),
    "what rounding took comes with the other sign": (PROJECTION, "    x += lost\n", "    x -= lost\n", long_sums),
    "a piece of M_B is dropped": (PROJECTION, "_pieces(m, PIECES) +", "_pieces(m, 2) + ((m * 0.0).to(tl.bfloat16),) +", fp32),
    "a piece of dM is dropped": (PROJECTION, "+ _pieces(dm, PIECES)", "+ _pieces(dm, 2) + ((m * 0.0).to(tl.bfloat16),)", fp32),
    "columns are stored in order": (PROJECTION, "(rows * V_PAD + at)", "(rows * V_PAD + cols)", bf16),
    "neighbours are stored in the other order": (PROJECTION, "+ own % 2\n", "+ 1 - own % 2\n", bf16),
    "rows beyond d_k are not stored": (PROJECTION, "mask=rows < K_PAD)", "mask=rows < D_K)", unset_is_nan(gaps)),
    # projections
    "a weight's second piece is dropped": (PROJECTION, "2 if x.dtype == tl.float16 else PIECES", "1 if x.dtype == tl.float16 else PIECES", fp16),
    "a weight's third piece is dropped": (PROJECTION, "2 if x.dtype == tl.float16 else PIECES", "2", fp32),
    "a change's second piece is dropped": (PROJECTION, "2 if base.dtype == tl.bfloat16", "1 if base.dtype == tl.bfloat16", bf16),
    "a change's third piece is dropped": (PROJECTION, "2 if base.dtype == tl.bfloat16 and task.dtype == tl.bfloat16 else PIECES", "2", fp32),
    "the smallest products are dropped": (PROJECTION, "    for i in tl.static_range(PIECES):\n        x = _multiply(x, left", "    for i in tl.static_range(1, PIECES):\n        x = _multiply(x, left", fp32),
    "the last block of d_k is lost": (PROJECTION, "range(0, D_K, K_BLOCK)", "range(0, D_K - K_BLOCK, K_BLOCK)", bf16),
    "a block of d_k replaces those ahead": (PROJECTION, "        w += _product(", "        w = _product(", bf16),
    "change of k and v is left out": (PROJECTION, "                       _transposed(_weights(qt)), _products(products_ptr, k, PIECES, K_PAD, V_PAD, K_BLOCK))", "                       (), ())", bf16),
    "change of k and v meets the base's q": (PROJECTION, "_transposed(_weights(qt)), _products", "_transposed(_weights(qb)), _products", bf16),
    "change of k and v is their product": (PROJECTION, "_products(products_ptr, k, PIECES,", "_products(products_ptr, k, 0,", bf16),
    "change of q meets that of k and v": (PROJECTION, "_transposed(_changes(qb, qt)), m,", "_transposed(_changes(qb, qt)), _products(products_ptr, k, PIECES, K_PAD, V_PAD, K_BLOCK),", bf16),
    "q beyond d_k is read": (PROJECTION, "(rows[None, :] < d_model) & (k + row < D_K) if", "rows[None, :] < d_model if", gaps),
    "columns change places": (PROJECTION, "(0, 2, 3, 5, 4, 6, 1)", "(0, 2, 3, 4, 5, 6, 1)", bf16),
    "halves of tiles change places": (PROJECTION, "first_and_second(w[i])\n        d0, d1 = first_and_second(dw[i])", "first_and_second(w[1 - i])\n        d0, d1 = first_and_second(dw[1 - i])", bf16),
    "halves of a lane change places": (PROJECTION, "(b0, d0, in_row & (cols < D_V)), (b1, d1, in_row & (cols + 8 < D_V))", "(b1, d1, in_row & (cols < D_V)), (b0, d0, in_row & (cols + 8 < D_V))", bf16),
    "columns beyond d_v": (PROJECTION, "in_row & (cols + 8 < D_V)", "in_row & (cols + 8 < V_PAD)", gaps),
    "rows beyond d_model": (PROJECTION, "(start + row < d_model)[:, None]", "(start + row < d_model + 16)[:, None]", gaps),
    "a projection's far statistics are not written": (PROJECTION, "RUNS), RUNS) > TAYLOR", "RUNS), RUNS) > 1e9", far_beside_near),
    "temperature is ignored in what is far of a projection": (PROJECTION, "farthest(squares, inv_tau, RUNS)", "farthest(squares, 1.0, RUNS)", hot_projection),
    "all listed tiles are the first": (PROJECTION, "tl.where(mine, tile, d_model)", "tl.where(mine, tl.sum(tl.where(each(RUNS) == 0, tile, 0), axis=0), d_model)", tall),
    "places in the list are of one head": (PROJECTION, "tl.program_id(0).to(tl.int64) * slots", "tl.program_id(0).to(tl.int64) * 0", many_groups),
    "near tiles of a projection beside exact ones count twice": (PROJECTION, "_scan(chunks, carry, exact, r, inv_tau, RUNS, True)", "_scan(chunks, carry, mine, r, inv_tau, RUNS, True)", far_beside_near),
    "exact tiles of a projection are scanned as near ones": (PROJECTION, "_scan(chunks, carry, exact, r, inv_tau, RUNS, True)", "_scan(chunks, carry, exact, r, inv_tau, RUNS, False)", far_beside_near),
    "a program takes all listed tiles of a projection": (PROJECTION, "i += tl.num_programs(1) * RUNS", "i += RUNS", tall),
    # series
    "a wrong term of the short KL": (SERIES, "m3 * 0.16667582", "m3 * -0.16667582", near),
    "a wrong term of the short JS": (SERIES, "m3 * 0.062504292", "m3 * -0.062504292", near),
    "the fourth powers are left out": (SERIES, "m4 * growth * growth", "m4 * 0.0", near),
    "the growth of Z is left out": (SERIES, "return kl * growth * growth, js", "return kl, js", near),
    "a coarse expm1": (SERIES, "inv_tau * inv_tau * inv_tau * 0.16666667", "inv_tau * 0.0", near),
    "a wrong term of expm1's long series": (SERIES, "x * (4.1666668e-2 + x * series)", "x * (4.1666668e-3 + x * series)", far),
    "a wrong sign in the KL series": (SERIES, "small = d * d * (0.5 - d * s)", "small = d * d * (0.5 + d * s)", far),
    # which heads are doubtful
    "unsound heads pass": (TABLES, "doubt |= ~(held &", "doubt &= (held &",
                           few_programs(lambda: checks.test_unsound_weights_are_refused_by_head("task", float("inf"), head_delta))),
    "faint logits pass": (TABLES, "(s.top > 1 / RANGE)", "(s.top >= 0)", few_programs(lambda: checks.test_logits_out_of_range(-95.0))),
    "loud logits pass": (TABLES, "(s.top < RANGE)", "(s.top < 1e38)", few_programs(lambda: checks.test_logits_out_of_range(80.0))),
    "far heads pass": (TABLES, "(s.far <= LARGE)", "(s.far <= 1e9)", few_programs(together)),
    "undone changes pass": (TABLES, "> MOVED * s.steps", "> 1e30 * s.steps", lambda: checks.test_changes_that_undo_each_other(0.02, 1e-3)),
    "faint squares pass": (TABLES, "(s.dd < FAINT * self.sizes)", "(s.dd < 0)", checks.test_squares_beyond_float32),
    "infinite squares pass": (TABLES, "~s.bb.isfinite() |", "", checks.test_squares_beyond_float32),
    "cancelled sums pass": (TABLES, "< ACROSS * moves * squares", "< 0 * moves", few_programs(lambda: checks.test_cosine_of_weights_that_shrink(1e-7))),
}
LEFT_OVER = [*FAULTS][[*FAULTS].index("unsound heads pass"):]


@pytest.fixture
def kernels_alone(monkeypatch):
    """A head that a fault sends to the CPU backend is a fault seen."""
    def refuse(*_, **__):
        raise AssertionError("left to the CPU backend")

    monkeypatch.setattr(cpu, "head_delta", refuse)
    monkeypatch.setattr(cpu, "head_delta_projection", refuse)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch, tmp_path, request):
    where, old, new, check = FAULTS[name]
    if name not in LEFT_OVER:
        request.getfixturevalue("kernels_alone")
    if isinstance(where, str):
        plant_kernel(monkeypatch, tmp_path, where, (old, new))
    else:
        plant(monkeypatch, where, (old, new))
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # no error of code that makes no sense
        check()


@pytest.mark.parametrize("left_over", [False, True])
def test_the_checks_are_green_without_a_fault(left_over, request):
    if not left_over:
        request.getfixturevalue("kernels_alone")
    for check in {id(check): check for name, (*_, check) in FAULTS.items() if (name in LEFT_OVER) == left_over}.values():
        if not getattr(check, "func", check).__name__.startswith("test_"):  # those run as they are
            check()
