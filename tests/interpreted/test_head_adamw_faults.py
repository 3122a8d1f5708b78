"""Every fault planted in the AdamW kernel turns the check that is named beside it red."""

import pytest
import torch

from tests.interpreted import test_head_adamw as checks
from tests.mutants import plant_kernel


def kernel(dtype, master, moments, amsgrad, ranges=checks.ALIGNED):
    return lambda: checks.test_head_adamw(ranges, dtype, master, moments, amsgrad)


plain = kernel(torch.float32, None, torch.float32, False)
odd = kernel(torch.float32, None, torch.float32, False, checks.ODD)
formula = lambda: checks.test_head_adamw_is_the_formula_in_float64(torch.float32)  # noqa: E731
ROW_MASK = "mask = (cols < n_cols) & (rows * COLS + cols < limit)\n    wide_rows"

FAULTS = {
    "no decay": ("numerics.py", [("    p = p * decay\n", "")], formula),
    "decay after the update": ("numerics.py", [("    p = p * decay\n", ""), ("p = p - step_size * ", "p = p * decay - step_size * decay * ")],
                               formula),
    "eps inside the root": ("numerics.py", [("        root = tl.sqrt_rn(v)\n", "        root = tl.sqrt_rn(v + eps)\n")],
                            checks.test_maximize_zero_beta_and_groups_of_their_own),
    "no second bias correction": ("numerics.py", [("root * inv_root2 + eps", "root + eps")], formula),
    "first moments do not decay": ("numerics.py", [("m + weight1 * (g - m)", "m + weight1 * g")], formula),
    "lerp from the far end": ("numerics.py", [("weight1 < 0.5, m", "weight1 < 2.0, m - m")],
                              checks.test_maximize_zero_beta_and_groups_of_their_own),
    "the running maximum forgets": ("numerics.py", [("(v > v_max) | (v != v), v, v_max)", "v > v_max, v, v)")],
                                    kernel(torch.float32, None, torch.bfloat16, True)),
    # A mask that lets too much through would write over the test's own memory: one that lets too little.
    "the last element of a run skipped": ("head_adamw.py", [(ROW_MASK, ROW_MASK.replace("< limit", "< limit - 1"))], odd),
    "the last column skipped": ("head_adamw.py", [(ROW_MASK, ROW_MASK.replace("< n_cols", "< n_cols - 1"))], odd),
    "the offset of the state lost": ("head_adamw.py", [("offs_state = s_off + ", "offs_state = ")], plain),
    "the gradient at the parameter's place": ("head_adamw.py", [("(g_off + wide_rows * g_stride + cols)",
                                                                 "(p_off + wide_rows * p_stride + cols)")],
                                              checks.test_strided_rows_and_gradients_of_another_layout),
    "the factor of the gradients ignored": ("head_adamw.py", [("factor *= tl.load(control_ptr)", "factor *= 1.0")],
                                            lambda: checks.test_scaling_and_clipping(checks.ALIGNED)),
    "the skip flag ignored": ("head_adamw.py", [("if tl.load(control_ptr + 1) != 0.0:", "if tl.load(control_ptr + 1) > 2.0:")],
                              checks.test_skip_flag_of_the_device_moves_nothing),
    "maximize ignored": ("head_adamw.py", [("factor = tl.load(hypers + 7)", "factor = tl.load(hypers + 7) * 0.0 + 1.0")],
                         checks.test_maximize_zero_beta_and_groups_of_their_own),
    "the lower half lost": ("numerics.py", [("(bits - (high << 16)).to(tl.int16)", "(bits & 0).to(tl.int16)")],
                            checks.test_the_split_master_is_bit_equal_to_the_reference_run),
    "the lower half without its sign": ("numerics.py", [("high + low.to(tl.int32)", "high + (low.to(tl.int32) & 0xFFFF)")],
                                        kernel(torch.bfloat16, "split", torch.float32, True)),
    "float16 units twice as wide": ("numerics.py", [("power * 1.4901161193847656e-08", "power * 2.9802322387695312e-08"),
                                                    ("rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) / unit_fp16(wide)",
                                                     "rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) * 67108864.0")],
                                    kernel(torch.float16, "split", torch.float32, False)),
    "bits of eight elements in another order": ("numerics.py", [("tl.interleave(w0, w2), tl.interleave(w1, w3)",
                                                                 "tl.interleave(w0, w1), tl.interleave(w2, w3)")],
                                                kernel(torch.bfloat16, "stochastic", torch.bfloat16, True)),
    "bits of odd runs by tile": ("numerics.py", [("index = first + rows * stride", "index = rows * stride")],
                                 kernel(torch.bfloat16, "stochastic", torch.bfloat16, True, checks.ODD)),
    "both moments rounded by the same bits": ("head_adamw.py", [("step, stream + 2,", "step, stream + 1,")],
                                              kernel(torch.float32, None, torch.bfloat16, True)),
    "the norm of what lies beside": ("head_adamw.py", [("(g_off + rows.to(tl.int64) * g_stride + cols), mask=mask",
                                                        "(rows.to(tl.int64) * g_stride + cols), mask=mask")],
                                     checks.test_the_gradient_norm_is_of_the_selection_and_repeats),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch, tmp_path):
    file, edits, check = FAULTS[name]
    plant_kernel(monkeypatch, tmp_path, file, *edits)
    with pytest.raises(Exception):  # noqa: B017, an assertion, or what the faulty code raises itself
        check()


def test_a_planted_copy_without_a_fault_is_green(monkeypatch, tmp_path):
    plant_kernel(monkeypatch, tmp_path, "numerics.py")
    plain()
