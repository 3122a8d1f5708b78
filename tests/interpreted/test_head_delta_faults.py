"""Every fault planted in the scoring kernels turns the check that is named beside it red."""

import pytest
import torch

from alps_kernels.ops import Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import cpu, tables as delta_tables
from tests.interpreted import test_head_delta_kernel as checks
from tests.interpreted.test_head_delta_kernel import SUMMED, close, segment, small_tiles  # noqa: F401, the fixture
from tests.ops.delta_oracle import projection_oracle, stored_oracle
from tests.support.mutants import plant, plant_kernel

HEADS, KERNELS, SUMS, PROJECTION, SERIES = (
    f"{name}.py" for name in ("delta_heads", "head_delta", "delta_sums", "head_projection", "series"))


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


def projected(*layer, scale=1.0, tau=1.0):
    layer = tuple(Segment(scale * s.base, scale * s.task, s.index) for s in layer)

    def check():
        found = head_delta_projection([layer], ["pad"], temperature=tau, backend="triton")
        close(found, projection_oracle([layer], tau), ["pad"])
    return check


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
project = lambda: checks.test_projection_equals_the_oracle(20, 24, 33)  # noqa: E731
tall = projected(*(segment(1, 16, 320, seed=seed) for seed in range(3)))
hot_projection = projected(*(segment(1, 16, 40, seed=seed, delta=5e-3) for seed in range(3)), scale=4.0, tau=0.5)
warm_projection = lambda: checks.test_projection_at_other_temperatures(0.5)  # noqa: E731
heavy = torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(0))
heavy[0, ::2, ::10] = 14.0
lower = heavy + 1e-3 * torch.randn(heavy.shape, generator=torch.Generator().manual_seed(1))
lower[0, ::2, ::10] -= 7.9
together = scored(Segment(heavy, lower, (0,)), metrics=["kl", "cosine"])

PRODUCTS = "(d, b, d, u, u, u * u, e, a, a)"  # with these, sums of d^2, b^2, b d, e u^2 and so on
FACTORS = PRODUCTS[1:-1].split(", ")
FAULTS = {
    # pass A
    **{f"sum {i} of pass A": (SUMS, PRODUCTS, f"({', '.join([*FACTORS[:i], f'2.0 * ({x})', *FACTORS[i + 1:]])})", near)
       for i, x in enumerate(FACTORS)},
    "odd before even": (KERNELS, "tl.join(even, odd)", "tl.join(odd, even)", pairs),
    "even for odd": (KERNELS, "(pair & -65536)", "(pair << 16)", pairs),
    "the behind count of pass A": (KERNELS, "- 16 - chunk - lane", "- 15 - chunk - lane", many),
    "the behind count of a tail": (KERNELS, "(TILE if FLAT else to_lanes(n, lane.shape[0], RUNS))", "TILE", tail),
    "the behind count of a projection": (PROJECTION, "% V_PAD) - 16\n", "% V_PAD) - 15\n", tall),
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
    "masked steps count": (SUMS, "tl.where(there, steps, 0.0) if MASKED else steps", "steps", tail),
    "a program takes the others' tiles": (KERNELS, "i += tl.num_programs(1) * RUNS", "i += RUNS", pad),
    # temperature
    "temperature is ignored in e": (SUMS, "b * (inv_tau * LOG2E)", "b * LOG2E", warm),
    "temperature twice in e": (SUMS, "b * (inv_tau * LOG2E)", "b * (inv_tau * inv_tau * LOG2E)", warm),
    "temperature is ignored in the changes of pass A": (SUMS, "expm1_less(d, 0.0, inv_tau", "expm1_less(d, 0.0, 1.0", warm),
    "temperature is ignored in the changes of pass B": (SUMS, "expm1_less(d, r, inv_tau, EXACT)", "expm1_less(d, r, 1.0, EXACT)", warm),
    "temperature is ignored in what is far": (SUMS, "RUNS)) * inv_tau\n", "RUNS))\n", hot),
    "the square of the short expm1": (SERIES, "inv_tau * inv_tau * 0.5,", "inv_tau * 0.5,", warm),
    "temperature twice": (None, "*kind.strides, 1 / tau", "*kind.strides, 1 / tau / tau", warm),
    "temperature twice in a projection": (None, "q.task.stride(1), 1 / tau", "q.task.stride(1), 1 / tau / tau", warm_projection),
    # heads and groups
    "one group for all": (None, "columns.append([len(bases) + place for", "columns.append([len(bases) + places[0] for", grouped),
    "matrices in memory's order": (None, "_addresses(s.task, read)", "_addresses(s.task, range(len(read)))", grouped),
    "places of a segment after the other": (None, "chain(*zip(*columns, strict=True))", "chain(*columns)", grouped),
    "kinds in the wrong order": (None, "kinds * count", "kinds[::-1] * count", grouped),
    "layers share their places": (None, "[len(bases) + place for", "[place for", layers),
    "layers share their groups": (None, "first + pairs[pair]", "pairs[pair]", project),
    "k of a group, v of the first": (None, "side[[p[1] for p in pairs]]", "side[[0 for p in pairs]]", project),
    # projections
    "change of k and v is left out": (PROJECTION, "        dw = tl.dot(qb_rows, md, acc=dw, input_precision=PRECISION)\n", "", project),
    "change of q meets the base's k and v": (PROJECTION, "tl.dot(tl.trans(qt - qb), mt,", "tl.dot(tl.trans(qt - qb), mb,", project),
    "columns beyond d_v": (PROJECTION, "offs_m = group * (D_K * D_V) + ks * D_V", "offs_m = group * (D_K * D_V) + ks * V_PAD", project),
    "rows beyond d_model": (PROJECTION, "(col < D_V), (tile * ROWS + row < d_model) & (col", "(col < D_V), (col", project),
    "halves of a lane change places": (PROJECTION, "return (b0, d0, in0), (b1, d1, in1)", "return (b1, d1, in1), (b0, d0, in0)", project),
    "a projection's far statistics are not written": (PROJECTION, "ALL, False) > TAYLOR:", "ALL, False) > 1e9:", hot_projection),
    # series
    "a wrong term of the short KL": (SERIES, "m3 * 0.16667582", "m3 * -0.16667582", near),
    "a wrong term of the short JS": (SERIES, "m3 * 0.062504292", "m3 * -0.062504292", near),
    "the fourth powers are left out": (SERIES, "m4 * growth * growth", "m4 * 0.0", near),
    "the growth of Z is left out": (SERIES, "return kl * growth * growth, js", "return kl, js", near),
    "a coarse expm1": (SERIES, "inv_tau * inv_tau * inv_tau * 0.16666667", "inv_tau * 0.0", near),
    "a wrong term of expm1's long series": (SERIES, "x * (4.1666668e-2 + x * series)", "x * (4.1666668e-3 + x * series)", far),
    "a wrong sign in the KL series": (SERIES, "small = d * d * (0.5 - d * s)", "small = d * d * (0.5 + d * s)", far),
    # which heads are doubtful
    "unsound heads pass": (None, "doubt |= ~(held &", "doubt &= (held &",
                           few_programs(lambda: checks.test_unsound_weights_are_refused_by_head("task", float("inf"), head_delta))),
    "faint logits pass": (None, "(s.top > 1 / RANGE)", "(s.top >= 0)", few_programs(lambda: checks.test_logits_out_of_range(-95.0))),
    "loud logits pass": (None, "(s.top < RANGE)", "(s.top < 1e38)", few_programs(lambda: checks.test_logits_out_of_range(80.0))),
    "far heads pass": (None, "(s.far <= LARGE)", "(s.far <= 1e9)", few_programs(together)),
    "undone changes pass": (None, "> MOVED * s.steps", "> 1e30 * s.steps", lambda: checks.test_changes_that_undo_each_other(0.02, 1e-3)),
    "faint squares pass": (None, "(s.dd < FAINT * self.sizes)", "(s.dd < 0)", checks.test_squares_beyond_float32),
    "infinite squares pass": (None, "~s.bb.isfinite() |", "", checks.test_squares_beyond_float32),
    "cancelled sums pass": (None, "< ACROSS * moves * squares", "< 0 * moves", few_programs(lambda: checks.test_cosine_of_weights_that_shrink(1e-7))),
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
    file, old, new, check = FAULTS[name]
    if name not in LEFT_OVER:
        request.getfixturevalue("kernels_alone")
    if file is None:
        plant(monkeypatch, delta_tables, (old, new))
    else:
        plant_kernel(monkeypatch, tmp_path, file, (old, new))
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check()


@pytest.mark.parametrize("left_over", [False, True])
def test_the_checks_are_green_without_a_fault(left_over, request):
    if not left_over:
        request.getfixturevalue("kernels_alone")
    for check in {id(check): check for name, (*_, check) in FAULTS.items() if (name in LEFT_OVER) == left_over}.values():
        check()
