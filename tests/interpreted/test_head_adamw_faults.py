"""Every fault planted in the AdamW kernel turns the check that is named beside it red."""

import pytest
import torch

from tests.interpreted import test_head_adamw as checks
from tests.support.mutants import plant_kernel


def kernel(dtype, master, moments, amsgrad, ranges=checks.ALIGNED):
    return lambda: checks.test_head_adamw(ranges, dtype, master, moments, amsgrad)


plain = kernel(torch.float32, None, torch.float32, False)
odd = kernel(torch.float32, None, torch.float32, False, checks.ODD)
eight = kernel(torch.float32, None, checks.EIGHT, False)
leaf = lambda: checks.test_a_leaf_writes_its_weight_and_moves_as_the_unsliced_weight(  # noqa: E731
    1, ((8, 24), (40, 48)), "triton", torch.float32, None, torch.float32)


def many(moments, kind="aligned"):
    ranges = {"aligned": ((0, 24), (40, 56)), "odd": ((1, 22), (30, 53))}[kind]

    def check():
        with pytest.MonkeyPatch.context() as patch:
            checks.test_tiles_of_any_size_give_the_same_bits(ranges, moments, patch)

    return check


formula = lambda: checks.test_head_adamw_is_the_formula_in_float64(torch.float32)  # noqa: E731

FAULTS = {
    "no decay": ("head_adamw.py", [("    p = p * decay\n", "")], formula),
    "decay after the update": ("head_adamw.py", [("    p = p * decay\n", ""), ("p = p - step_size * ", "p = p * decay - step_size * decay * ")],
                               formula),
    "eps inside the root": ("head_adamw.py", [("        root = tl.sqrt_rn(v)\n", "        root = tl.sqrt_rn(v + eps)\n")],
                            checks.test_maximize_zero_beta_and_groups_of_their_own),
    "no second bias correction": ("head_adamw.py", [("root * inv_root2 + eps", "root + eps")], formula),
    "first moments do not decay": ("head_adamw.py", [("m + weight1 * (g - m)", "m + weight1 * g")], formula),
    "lerp from the far end": ("head_adamw.py", [("weight1 < 0.5, m", "weight1 < 2.0, m - m")],
                              checks.test_maximize_zero_beta_and_groups_of_their_own),
    "the running maximum forgets": ("head_adamw.py", [("(v > v_max) | (v != v), v, v_max)", "v > v_max, v, v)")],
                                    kernel(torch.float32, None, torch.bfloat16, True)),
    # A mask that lets too much through would write over the test's own memory: one that lets too little.
    "the last element of a run skipped": ("head_adamw.py", [("mask = count < limit", "mask = count < limit - 1")], odd),
    "the last eight of a run skipped": ("head_adamw.py", [("* 8 < limit\n", "* 8 < limit - 8\n")], plain),
    "the row of a tile not counted from its first": ("head_adamw.py", [("row = (first + count) // width", "row = count // width")],
                                                    many(torch.bfloat16, "odd")),
    "columns of a row taken for rows": ("head_adamw.py", [("row = at // (width // 8)", "row = at // width")], plain),
    "the offset of the state lost": ("head_adamw.py", [("place = _field(tile, TILE_S_OFF, ALIGNED) + ", "place = ")], plain),
    "the gradient at the parameter's place": ("head_adamw.py", [
        ("offs_g = _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED)",
         "offs_g = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED)")],
                                              checks.test_strided_rows_and_gradients_of_another_layout),
    "the factor of the gradients ignored": ("head_adamw.py", [("tl.div_rn(1.0, tl.load(scale_ptr))", "1.0")],
                                            lambda: checks.test_scaling_and_clipping(checks.ALIGNED)),
    "the skip flag ignored": ("head_adamw.py", [("if tl.load(found_inf_ptr) != 0.0:", "if tl.load(found_inf_ptr) > 2.0:")],
                              checks.test_skip_flag_of_the_device_moves_nothing),
    "maximize ignored": ("head_adamw.py", [("factor *= tl.load(hypers + HYPER_SIGN)", "factor *= tl.load(hypers + HYPER_SIGN) * 0.0 + 1.0")],
                         checks.test_maximize_zero_beta_and_groups_of_their_own),
    "the lower half lost": ("rounding.py", [("(bits - (high << 16)).to(tl.int16)", "(bits & 0).to(tl.int16)")],
                            checks.test_the_split_master_is_bit_equal_to_the_oracles),
    "the lower half without its sign": ("rounding.py", [("high + low.to(tl.int32)", "high + (low.to(tl.int32) & 0xFFFF)")],
                                        kernel(torch.bfloat16, "split", torch.float32, True)),
    "float16 units twice as wide": ("rounding.py", [("power * 1.4901161193847656e-08", "power * 2.9802322387695312e-08"),
                                                    ("rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) / unit_fp16(wide)",
                                                     "rest = tl.where(tl.abs(wide) <= FINITE, x - wide, 0.0) * 67108864.0")],
                                    kernel(torch.float16, "split", torch.float32, False)),
    "bits of eight elements in another order": ("rounding.py", [("tl.where(which < 2, w0, w1)", "tl.where(which < 2, w1, w0)")],
                                                kernel(torch.bfloat16, "stochastic", torch.bfloat16, True)),
    "bits of odd runs twice": ("rounding.py", [("(lane if BY_EIGHT else place & 7)", "(lane if BY_EIGHT else place & 3)")],
                                 kernel(torch.bfloat16, "stochastic", torch.bfloat16, True, checks.ODD)),
    "both moments rounded by the same bits": ("head_adamw.py", [
        ("noise = random16(place, lane, seed, step, stream + EXP_AVG_SQ_BITS",
         "noise = random16(place, lane, seed, step, stream + EXP_AVG_BITS")],
                                              kernel(torch.float32, None, torch.bfloat16, True)),
    "codes of first moments up": ("quantize8.py", [("1e-30)) + ROUND) - ROUND", "1e-30)) + 1.0 + ROUND) - ROUND")], eight),
    "the scale of the tile's first 64": ("head_adamw.py", [
        ("POINTER_EXP_AVG_SCALE, tl.float32, False) + (\n            tl.load(tile + TILE_SCALE) + group // 8)",
         "POINTER_EXP_AVG_SCALE, tl.float32, False) + (\n            tl.load(tile + TILE_SCALE) + 0 * group)")],
                                         many(checks.EIGHT)),
    "the scale of another tile": ("head_adamw.py", [
        ("POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + (\n            tl.load(tile + TILE_SCALE) + group // 8)",
         "POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + (\n            group // 8)")],
                                  many(checks.EIGHT)),
    "a scale for each eight": ("quantize8.py", [("most = tl.max(tl.reshape(most, [n // 8, 8]), 1, keep_dims=True)",
                                                "most = tl.min(tl.reshape(most, [n // 8, 8]), 1, keep_dims=True)")], eight),
    "codes without a sign": ("quantize8.py", [("tl.where(code < 0, -(square * square), square * square)", "square * square")], eight),
    "square roots for fourth roots": ("quantize8.py", [("    root = tl.sqrt(tl.sqrt(tl.abs(x)))\n", "    root = tl.sqrt(tl.abs(x))\n")],
                                      eight),
    "second moments down": ("quantize8.py", [("code += tl.where((x - low) * 65536.0 >", "code += tl.where((x - low) * 0.0 >")], eight),
    "the copy forgotten": ("head_adamw.py", [("if tl.load(pointers + POINTER_WEIGHT_COPY) != 0:",
                                              "if tl.load(pointers + POINTER_WEIGHT_COPY) == 1:")], leaf),
    "the copy at the leaf's place": ("head_adamw.py", [
        ("offs_c = _field(tile, TILE_COPY_OFF, ALIGNED)", "offs_c = _field(tile, TILE_P_OFF, ALIGNED)")], leaf),
    "the norm of what lies beside": ("head_adamw.py", [("        _field(tile, TILE_G_OFF, ALIGNED) + row", "        row")],
                                     checks.test_the_gradient_norm_is_of_the_selection_and_repeats),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch, tmp_path):
    file, edits, check = FAULTS[name]
    plant_kernel(monkeypatch, tmp_path, file, *edits)
    with pytest.raises(Exception):  # noqa: B017, an assertion, or what the faulty code raises itself
        check()


def test_a_planted_copy_without_a_fault_is_green(monkeypatch, tmp_path):
    plant_kernel(monkeypatch, tmp_path, "rounding.py")
    plain()
