"""Every fault planted in the scoring kernels turns the check that is named beside it red."""

import pytest
import torch

from alps_kernels.ops.delta import cpu, tables as delta_tables
from tests.interpreted import test_head_delta_kernel as checks
from tests.interpreted.test_head_delta_kernel import small_tiles  # noqa: F401, the fixture
from tests.support.mutants import plant, plant_kernel

KERNELS, SUMS, PROJECTION, SERIES = "head_delta.py", "delta_sums.py", "head_projection.py", "series.py"
tiles = lambda: checks.test_every_metric_equals_the_oracle(16, 40, "", torch.float32)  # noqa: E731
pairs = lambda: checks.test_every_metric_equals_the_oracle(16, 40, "", torch.bfloat16)  # noqa: E731
tail = lambda: checks.test_every_metric_equals_the_oracle(3, 21, "", torch.float32)  # noqa: E731
large = lambda: checks.test_temperature(0.05)  # noqa: E731
near = lambda: checks.test_small_differences_survive(4e-3)  # noqa: E731, just within the short series
project = lambda: checks.test_projection_equals_the_oracle(20, 24, 33)  # noqa: E731
warm = lambda: checks.test_projection_at_other_temperatures(0.5)  # noqa: E731

FAULTS = {
    "carry between tiles is lost": (KERNELS, "state = (start[START_CARRY],", "state = (start[START_CARRY] * 0.0,", tiles),
    "carry between chunks is lost": (KERNELS, "return carry + tl.sum(whole, axis=0), steps", "return carry, steps", tiles),
    "a lane's second half starts where its first does": (KERNELS, "before + half, right", "before, right", tiles),
    "a lane's changes come twice": (KERNELS, "(tl.cumsum(whole, axis=0) - whole)", "tl.cumsum(whole, axis=0)", tiles),
    "odd before even": (KERNELS, "tl.join(even, odd)", "tl.join(odd, even)", pairs),
    "even for odd": (KERNELS, "(pair & -65536)", "(pair << 16)", pairs),
    "the mean shift is forgotten": (SUMS, "m = expm1_less(d, r, inv_tau, EXACT)", "m = expm1_less(d, 0.0, inv_tau, EXACT)", tiles),
    "moves are not weighted": (KERNELS, "tl.fma(e, expm1_less(d, 0.0, inv_tau, False), moved)",
                               "moved + expm1_less(d, 0.0, inv_tau, False)", near),
    "far moves are not weighted": (KERNELS, "moved, tl.exp2(b * (inv_tau * LOG2E)), expm1", "moved, b * 0.0 + 1.0, expm1", large),
    "a masked element counts in pass A": (KERNELS, "< there, e, 0.0)", "< BLOCK, e, 0.0)", tail),
    "a masked element counts in pass B": (SUMS, "e = tl.where(mask, e, 0.0)", "pass", tail),
    "a head's last element counts": (SUMS, "steps = tl.where(counted, steps, 0.0)", "steps = steps + tl.where(counted, 0.0, 1.0)", tail),
    "the task's row stride is the base's": (KERNELS, "tl.load(segment + SEGMENT_TASK_ROW)", "tl.load(segment + SEGMENT_BASE_ROW)",
                                            checks.test_each_model_has_strides_of_its_own),
    "a tile starts at its row's first column": (KERNELS, "(start % cols).to(tl.int32)", "0",
                                                lambda: checks.test_every_metric_equals_the_oracle(1, 257, "", torch.float32)),
    "temperature is ignored": (KERNELS, "e = tl.exp2(b * (inv_tau * LOG2E))", "e = tl.exp2(b * LOG2E)", large),
    "change of k and v is left out": (PROJECTION, "        dw = tl.dot(qb_rows, md, acc=dw, input_precision=PRECISION)\n", "", project),
    "change of q meets the base's k and v": (PROJECTION, "tl.dot(tl.trans(qt - qb), mt,", "tl.dot(tl.trans(qt - qb), mb,", project),
    "temperature twice in pass A of projection": (PROJECTION, "e = tl.where(mask, tl.exp2(w * (inv_tau * LOG2E)), 0.0)",
                                                  "e = tl.where(mask, tl.exp2(w * (inv_tau * inv_tau * LOG2E)), 0.0)", warm),
    "temperature twice in the moves of projection": (PROJECTION, "    if farthest <= TAYLOR:\n        moved",
                                                     "    inv_tau *= inv_tau\n    if farthest <= TAYLOR:\n        moved", warm),
    "temperature twice in pass B of projection": (PROJECTION, "inside, sums = step(w, dw, mask, start, inv_tau,",
                                                  "inside, sums = step(w, dw, mask, start, inv_tau * inv_tau,", warm),
    "temperature is ignored in pass B": (SUMS, "e = tl.exp2(tl.fma(b, inv_tau * LOG2E, -shift))", "e = tl.exp2(tl.fma(b, LOG2E, -shift))", large),
    "columns beyond d_v": (PROJECTION, "offs_m = group * (D_K * D_V) + ks * D_V", "offs_m = group * (D_K * D_V) + ks * V_PAD", project),
    "a projection's carry is lost": (PROJECTION, "before = start[START_CARRY] +", "before = 0.0 * start[START_CARRY] +", project),
    "a partial tile is taken as full": (None, "full = (count == BLOCK) & flat", "full = count > 0",
                                        checks.test_grouped_heads_several_segments_and_layers_of_other_shapes),
    "partial tiles are left out": (None, "for which in (full, ~full):", "for which in (full,):", tail),
    "pass B takes pass A's order for its own": (KERNELS, "(tl.num_programs(0) - 1 - tl.program_id(0))", "(tl.num_programs(0) // 2)", tiles),
    "the short series of expm1 for any change": (KERNELS, "if farthest > TAYLOR:", "if farthest > 1000.0:", large),
    "the short series of pass B for any change": (KERNELS, "if start[START_FAR] <= TAYLOR:", "if start[START_FAR] <= 1000.0:", large),
    "a bound that bounds nothing": (SUMS, "tl.sqrt(tl.max(tl.ravel(dd), axis=0)) * inv_tau", "tl.sqrt(tl.max(tl.ravel(dd), axis=0)) * 0.0", large),
    "the unit of e is forgotten": (None, "unit = shift.double().neg().exp2()", "unit = shift.double() * 0 + 1", tiles),
    "a wrong term of the short KL": (SERIES, "tl.fma(m3, -0.16667582", "tl.fma(m3, 0.16667582", near),
    "a wrong term of the short JS": (SERIES, "tl.fma(m3, -0.062504292", "tl.fma(m3, 0.062504292", near),
    "the fourth powers are left out": (SERIES, "m4 * growth * growth", "m4 * 0.0", near),
    "the growth of Z is left out": (SERIES, "return kl * growth * growth, js", "return kl, js", near),
    "divergences of weights that are not there": (SUMS, "weighted = e * square", "weighted = square", near),
    "a coarse expm1": (SERIES, "inv_tau * inv_tau * inv_tau * 0.16666667", "inv_tau * 0.0", near),
    "a wrong term of expm1's long series": (SERIES, "x * (4.1666668e-2 + x * series)", "x * (4.1666668e-3 + x * series)", large),
    "a wrong sign in the KL series": (SERIES, "small = d * d * (0.5 - d * s)", "small = d * d * (0.5 + d * s)", large),
    "carries include their own tile": (None, "change.cumsum(1) - change", "change.cumsum(1)", tiles),
    "segments share their slots": (None, "first_slot = first_slot + len(start)", "first_slot = first_slot + 0",
                                   checks.test_grouped_heads_several_segments_and_layers_of_other_shapes),
    "layers share their groups": (None, "first + pairs[pair]", "pairs[pair]", project),
    "a flat tile's address counts elements": (None, "start * side.element_size()", "start", tiles),
    "unsound heads pass": (None, "self.squares[0].isfinite()", "(self.squares[0] == self.squares[0])",
                           lambda: checks.test_unsound_weights_are_refused_by_head("task", float("inf"))),
    "faint logits pass": (None, "(self.top > 1 / RANGE)", "(self.top >= 0)", lambda: checks.test_logits_out_of_range(-95.0)),
    "loud logits pass": (None, "(self.top < RANGE)", "(self.top < 1e36)", lambda: checks.test_logits_out_of_range(80.0)),
    "sums that are no numbers pass": (None, "~(held & self.z_task.isfinite())", "~held", checks.test_a_temperature_beyond_float32),
    "concentrated heads pass": (None, "(self.few >= CONCENTRATED)", "(self.few > 0)",
                                lambda: checks.test_a_dominating_weight_that_moves(0.5, 20.0, ["pad"])),
    "far heads pass": (None, "(self.largest <= LARGE)", "(self.largest <= 1e9)", checks.test_dominating_weights_that_move_together),
}
LEFT_OVER = ("faint logits pass", "loud logits pass", "sums that are no numbers pass", "concentrated heads pass", "far heads pass")


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
        kernels = "head_projection" if file == PROJECTION else "head_delta"
        plant_kernel(monkeypatch, tmp_path, file, (old, new), kernels=kernels)
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check()


@pytest.mark.parametrize("left_over", [False, True])
def test_the_checks_are_green_without_a_fault(left_over, request):
    if not left_over:
        request.getfixturevalue("kernels_alone")
    for check in {id(check): check for name, (*_, check) in FAULTS.items() if (name in LEFT_OVER) == left_over}.values():
        check()
