"""Every fault planted in the scoring kernels turns the check that is named beside it red."""

import pytest
import torch

from alps_kernels.ops import delta_tables
from tests.interpreted import test_head_delta_kernel as checks
from tests.interpreted.test_head_delta_kernel import small_tiles  # noqa: F401, the fixture
from tests.mutants import plant, plant_kernel

SCAN, NUMERICS = "head_delta.py", "numerics.py"
tiles = lambda: checks.test_every_metric_equals_the_oracle(16, 40, "", torch.float32)  # noqa: E731
project = lambda: checks.test_projection_equals_the_oracle(20, 24, 33)  # noqa: E731

FAULTS = {
    "carry between tiles is lost": (SCAN, " + tl.load(carry_ptr + slot)", "", tiles),
    "the mean shift is forgotten": (SCAN, "moved = expm1(d * inv_tau, largest) - r", "moved = expm1(d * inv_tau, largest)", tiles),
    "moves are not weighted": (SCAN, "tl.sum(e * expm1(x, largest), axis=0)", "tl.sum(expm1(x, largest), axis=0)", tiles),
    "a masked element counts": (SCAN, "e = tl.where(mask, e, 0.0)", "pass",
                                lambda: checks.test_every_metric_equals_the_oracle(3, 21, "", torch.float32)),
    "the task's row stride is the base's": (SCAN, "r * tl.load(segment + 5)", "r * tl.load(segment + 3)",
                                            checks.test_each_model_has_strides_of_its_own),
    "temperature is ignored": (SCAN, "logit = b * (inv_tau * LOG2E)", "logit = b * LOG2E",
                               lambda: checks.test_temperature(0.05)),
    "change of k and v is left out": (SCAN, "        dw = tl.dot(qb_rows, md, acc=dw, input_precision=PRECISION)\n", "", project),
    "change of q meets the base's k and v": (SCAN, "tl.dot(tl.trans(qt - qb), mt,", "tl.dot(tl.trans(qt - qb), mb,", project),
    "columns beyond d_v": (SCAN, "offs_m = group * (D_K * D_V) + ks * D_V", "offs_m = group * (D_K * D_V) + ks * V_PAD", project),
    "a partial tile is taken as full": (None, "full = (count == BLOCK) & (last == 0)", "full = last == 0",
                                        checks.test_grouped_heads_several_segments_and_layers_of_other_shapes),
    "partial tiles are left out": (None, "for which in (full, ~full):", "for which in (full,):", tiles),
    "pass B takes pass A's order for its own": (SCAN, "(tl.num_programs(0) - 1 - tl.program_id(0))", "(tl.num_programs(0) // 2)", tiles),
    "the short series of expm1 for any change": (NUMERICS, "if largest <= TAYLOR:\n        return x", "if largest <= 1000.0:\n        return x",
                                                 lambda: checks.test_temperature(0.05)),
    "the short series of KL for any change": (NUMERICS, "if largest <= TAYLOR:  #", "if largest <= 1000.0:  #",
                                              lambda: checks.test_temperature(0.05)),
    "a bound that bounds nothing": (SCAN, "slot * STAT_FIELDS + 6", "slot * STAT_FIELDS + 2", lambda: checks.test_temperature(0.05)),
    "tile maxima in natural logarithms": (None, "(stats[:, :, 0] - top).exp2()", "(stats[:, :, 0] - top).exp()", tiles),
    "a wrong term of the short KL": (NUMERICS, "0.083333333), -0.16666667), 0.5)", "0.083333333), 0.16666667), 0.5)",
                                     lambda: checks.test_small_differences_survive(4e-3)),
    "a wrong term of the short JS": (NUMERICS, "0.036458333), -0.0625), 0.125)", "0.036458333), 0.0625), 0.125)",
                                     lambda: checks.test_small_differences_survive(4e-3)),
    "divergences of weights that are not there": (NUMERICS, "square = p * d * d", "square = d * d",
                                                  lambda: checks.test_small_differences_survive(4e-3)),
    "a coarse expm1": (NUMERICS, "return x * tl.fma(x, tl.fma(x, tl.fma(x, 0.041666668, 0.16666667), 0.5), 1.0)", "return x + 0.5 * x * x",
                       lambda: checks.test_small_differences_survive(4e-3)),
    "a wrong term of expm1's long series": (NUMERICS, "x * (4.1666668e-2 + x * series)", "x * (4.1666668e-3 + x * series)",
                                            lambda: checks.test_temperature(0.05)),
    "a wrong sign in the KL series": (NUMERICS, "small = d * d * (0.5 - d * s)", "small = d * d * (0.5 + d * s)", tiles),
    "carries include their own tile": (None, "change.cumsum(1) - change", "change.cumsum(1)", tiles),
    "segments share their slots": (None, "first_slot = first_slot + len(start)", "first_slot = first_slot + 0",
                                   checks.test_grouped_heads_several_segments_and_layers_of_other_shapes),
    "layers share their groups": (None, "first + pairs[pair]", "pairs[pair]", project),
    "unsound heads pass": (None, "self.squares.isfinite().all(1)", "(self.squares == self.squares).all(1)",
                           lambda: checks.test_unsound_weights_are_refused_by_head("task", float("inf"))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch, tmp_path):
    file, old, new, check = FAULTS[name]
    if file is None:
        plant(monkeypatch, delta_tables, (old, new))
    else:
        plant_kernel(monkeypatch, tmp_path, file, (old, new), kernels="head_delta")
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check()


def test_the_checks_are_green_without_a_fault():
    for check in {id(check): check for *_, check in FAULTS.values()}.values():
        check()
