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


def in_programs(tiles):
    with pytest.MonkeyPatch.context() as patch:
        checks.test_programs_of_any_number_of_tiles_give_the_same_bits(tiles, patch)


FAULTS = {
    "no decay": ("head_adamw.py", [("    p = p * decay\n", "")], formula),
    "decay after the update": ("head_adamw.py", [
        ("    p = p * decay\n", ""), ("p = p - step_size * tl.div_rn(", "p = p * decay - step_size * decay * tl.div_rn(")],
                               formula),
    "eps inside the root": ("head_adamw.py", [("tl.sqrt_rn(most) * inv_root2", "tl.sqrt_rn(most + eps) * inv_root2")],
                            checks.test_maximize_zero_beta_and_groups_of_their_own),
    "no second bias correction": ("head_adamw.py", [("tl.sqrt_rn(most) * inv_root2 + eps", "tl.sqrt_rn(most) + eps")], formula),
    "first moments do not decay": ("head_adamw.py", [("weight1 - 1.0) * (g - m)", "weight1 - 1.0) * g")], formula),
    "lerp from the far end": ("head_adamw.py", [("near = weight1 < 0.5", "near = weight1 < 2.0")],
                              checks.test_zero_beta1_gives_the_gradient_itself),
    "the running maximum forgets": ("head_adamw.py", [("(v > v_max) | (v != v), v, v_max)", "v > v_max, v, v)")],
                                    kernel(torch.float32, None, torch.bfloat16, True)),
    # A mask that lets too much through would write over the test's own memory: one that lets too little.
    "the last element of a run skipped": ("head_adamw.py", [("count * L + lane < limit", "count * L + lane < limit - 1")], odd),
    "the last eight of a run skipped": ("head_adamw.py", [("count * L + lane < limit", "count * L + lane < limit - 8")], plain),
    "the row of a tile not counted from its first": ("head_adamw.py", [("row = (first + count) // width", "row = count // width")],
                                                    many(torch.bfloat16, "odd")),
    "columns of a row taken for rows": ("head_adamw.py", [("row = (first + count) // width", "row = (first + count) // (width * L)")], plain),
    "the offset of the state lost": ("head_adamw.py", [("place = _field(tile, TILE_S_OFF, ALIGNED) + ", "place = ")], plain),
    "the gradient at the parameter's place": ("head_adamw.py", [
        ("offs_g = _field(tile, TILE_G_OFF, ALIGNED) + row * _field(tile, TILE_G_STRIDE, ALIGNED)",
         "offs_g = _field(tile, TILE_P_OFF, ALIGNED) + row * _field(tile, TILE_P_STRIDE, ALIGNED)")],
                                              checks.test_strided_rows_and_gradients_of_another_layout),
    "the factor of the gradients ignored": ("head_adamw.py", [("tl.where(clipped, over, 1.0) * scale)", "tl.where(clipped, over, 1.0))")],
                                            lambda: checks.test_scaling_and_clipping(checks.ALIGNED)),
    "the skip flag ignored": ("head_adamw.py", [("(tl.load(found_inf_ptr) == 0.0)", "(tl.load(found_inf_ptr) <= 2.0)")],
                              checks.test_skip_flag_of_the_device_moves_nothing),
    "maximize ignored": ("head_adamw.py", [("(factor * sign)", "factor")],
                         checks.test_maximize_zero_beta_and_groups_of_their_own),
    "the lower half lost": ("rounding.py", [("(bits - (high << 16)).to(tl.int16)", "(bits & 0).to(tl.int16)")],
                            checks.test_the_split_master_is_bit_equal_to_the_oracles),
    "the lower half without its sign": ("rounding.py", [("high + low.to(tl.int32)", "high + (low.to(tl.int32) & 0xFFFF)")],
                                        kernel(torch.bfloat16, "split", torch.float32, True)),
    "float16 units twice as wide": ("rounding.py", [("power * 1.4901161193847656e-08", "power * 2.9802322387695312e-08"),
                                                    ("FINITE, x - wide, 0.0) * inverse", "FINITE, x - wide, 0.0) * 67108864.0")],
                                    kernel(torch.float16, "split", torch.float32, False)),
    "bits of eight elements in another order": ("rounding.py", [("== 0, w0, w1)", "== 0, w1, w0)")],
                                                kernel(torch.bfloat16, "stochastic", torch.bfloat16, True)),
    "bits of odd runs twice": ("rounding.py", [("& (8 - lane.shape[1])", "& (4 - lane.shape[1])")],
                                 kernel(torch.bfloat16, "stochastic", torch.bfloat16, True, checks.ODD)),
    "both moments rounded by the same bits": ("head_adamw.py", [
        ("v = round_stochastically(v, random16(*bits, stream + EXP_AVG_SQ_BITS)", "v = round_stochastically(v, random16(*bits, stream + EXP_AVG_BITS)")],
                                              kernel(torch.float32, None, torch.bfloat16, True)),
    "codes of first moments up": ("quantize8.py", [("scale)).to(tl.float32)\n    return tl.where(x < 0", "scale * 0.0)).to(tl.float32)\n    return tl.where(x < 0")], eight),
    "the scale of the tile's first 64": ("head_adamw.py", [("POINTER_EXP_AVG_SCALE, tl.float32, False) + scale", "POINTER_EXP_AVG_SCALE, tl.float32, False) + 0 * scale")],
                                         many(checks.EIGHT)),
    "the scale of another tile": ("head_adamw.py", [("POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + scale", "POINTER_EXP_AVG_SQ_SCALE, tl.float32, False) + block")],
                                  many(checks.EIGHT)),
    "a scale for each eight": ("quantize8.py", [("most = tl.max(tl.max(most, 2, keep_dims=True)", "most = tl.max(tl.min(most, 2, keep_dims=True)")], eight),
    "codes without a sign": ("quantize8.py", [("(raw(root) & -0x80000000)", "(raw(root) & 0)")], eight),
    "square roots for fourth roots": ("quantize8.py", [("    square = root * root\n    return square * square\n", "    square = root * root\n    return square\n")],
                                      eight),
    "second moments down": ("quantize8.py", [("+ up.to(tl.float32), (x > 0)", "+ 0.0 * up.to(tl.float32), (x > 0)")], eight),
    "the copy forgotten": ("head_adamw.py", [("tl.zeros([1, 1], tl.int64) != 0)", "tl.zeros([1, 1], tl.int64) == 1)")], leaf),
    "the copy at the leaf's place": ("head_adamw.py", [
        ("offs_c = _field(tile, TILE_COPY_OFF, ALIGNED)", "offs_c = _field(tile, TILE_P_OFF, ALIGNED)")], leaf),
    "gradients clipped to twice the norm": ("head_adamw.py", [("tl.where(clipped, max_norm, 1.0)", "tl.where(clipped, 2.0 * max_norm, 1.0)")],
                                            lambda: checks.test_the_norm_clips_inside_the_kernel(3.0)),
    "gradients of a small norm scaled up": ("head_adamw.py", [("clipped = (max_norm >= over) == 0", "clipped = over == over")],
                                            lambda: checks.test_the_norm_clips_inside_the_kernel(0.01)),
    "a NaN norm ignored": ("head_adamw.py", [("clipped = (max_norm >= over) == 0", "clipped = max_norm < over")],
                           lambda: checks.test_the_norm_clips_inside_the_kernel(float("nan"))),
    "the second tile of a program forgotten": ("head_adamw.py", [
        ("        _step_tile(*second, factor", "        _step_tile(*first, factor")], lambda: in_programs(2)),
    "the second tile of a program is the first": ("head_adamw.py", [("_load_tile(tile + TILE_FIELDS,", "_load_tile(tile,")],
                                                  lambda: in_programs(2)),
    "the last tiles of a norm's program forgotten": ("head_adamw.py", [("    for k in tl.static_range(TILES):", "    for k in tl.static_range(1):")],
                                                     lambda: in_programs(1)),
    "the norm of scaled gradients": ("head_adamw.py", [("factor = _grad_factor(float(\"-inf\"), _load(scale_ptr, 1.0), 1.0)",
                                                        "factor = _grad_factor(float(\"-inf\"), 1.0, 1.0)")],
                                     lambda: checks.test_scaling_and_clipping(checks.ALIGNED)),
    "weight decay of the first group for all": ("head_adamw.py", [("tl.load(hypers + HYPER_DECAY)", "tl.load(hypers_ptr + HYPER_DECAY)")],
                                                checks.test_maximize_zero_beta_and_groups_of_their_own),
    "bias correction of the first parameter for all": ("head_adamw.py", [("tl.load(hypers + HYPER_INV_ROOT2)", "tl.load(hypers_ptr + HYPER_INV_ROOT2)")],
                                                       checks.test_elements_of_different_ages_have_their_own_bias_correction),
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
