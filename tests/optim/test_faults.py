"""Every fault planted in the optimizer turns the check that is named beside it red."""

import pytest
import torch
from torch import nn

from alps_kernels.ops.adamw import (
    codes8 as reference_codes,
    cpu as reference_adamw,
    op as head_adamw,
    param_update as updates,
    rounding as reference_rounding,
    tables as adamw_tables,
)
from alps_kernels.optim import head_adamw as optimizer, state, state_dict as saved_state, step_cache as arguments
from alps_kernels.selection import BoundParam
from tests.ops import test_adamw_tables
from tests.optim import (
    cases as optimizer_cases,
    test_8bit as test_optimizer_8bit,
    test_head_adamw as test_optimizer,
    test_precision as test_optimizer_precision,
    test_state_dict as test_optimizer_state,
    test_step_cache as test_arguments,
)

from ..support.mutants import plant

formula = test_optimizer.test_float32_equals_the_formula_in_float64
masked = test_optimizer.test_selected_slices_equal_torch_with_a_mask
tiles = test_adamw_tables.test_tiles_cover_the_selection_exactly_once


def frozen():
    test_optimizer.test_every_byte_outside_the_selection_stays(torch.float32, float("nan"))


def reselected():
    test_optimizer_state.test_reselection_keeps_what_stays_and_starts_afresh_what_joins(
        torch.float32, "split", torch.float32)


def alignment():
    part = BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((30, 64),))
    test_adamw_tables.test_alignment_is_found(lambda: part, False)


def rounding():
    test_optimizer_precision.test_stochastic_rounding_is_unbiased_and_goes_to_neighbours(torch.bfloat16)


def all_heads(**options):
    return lambda: test_optimizer.test_all_parameters_equal_torch_over_50_steps(options)


def resume(master, moments):
    return lambda: test_optimizer_state.test_resume_is_bit_equal_and_keeps_dtypes(torch.bfloat16, master, moments, 4)


def refused(name):
    case, message = next((c, m) for n, c, m in test_optimizer_state.refusals() if n == name)
    return lambda: test_optimizer_state.test_state_of_another_selection_or_precision_is_refused_whole(case, message)


def changed(name):
    return lambda: test_arguments.test_a_change_is_seen(name)


def errors():
    test_optimizer_8bit.test_errors_are_as_stated()


def carried():
    test_optimizer_8bit.test_reselection_carries_what_stays(torch.float32)


def resume_8bit():
    """The moments after a step are those of the gradient, in every block."""
    params, bound = optimizer_cases.toy()
    one = optimizer_cases.make(params, bound, moment_dtype="8bit")
    optimizer_cases.run(params, one, bound, 1)
    for part in bound.params:
        moments = one._slots[part.param].decoded(one.state[part.param])["exp_avg"].reshape(-1)
        torch.testing.assert_close(moments, 0.1 * part.cut(part.param.grad), rtol=0.2, atol=2e-3)


MUL = "    params = torch._foreach_mul(params, hyper.decay)\n"
NO_DECAY = "    params = torch._foreach_mul(params, 1.0)\n"
LAST = "    torch._foreach_addcdiv_(params, exp_avgs, roots, -hyper.step_size)\n"
ROOT = "torch._foreach_sqrt(exp_avg_sqs if max_exp_avg_sqs is None else max_exp_avg_sqs)"
INSIDE = "torch._foreach_sqrt(torch._foreach_add(exp_avg_sqs, hyper.eps))"

FAULTS = {
    "no decay": (reference_adamw, [(MUL, NO_DECAY)], formula),
    "decay after the update": (reference_adamw, [(MUL, NO_DECAY), (LAST, LAST + MUL)], formula),
    "decay in the gradient": (reference_adamw, [(MUL, NO_DECAY + "    grads = torch._foreach_add(grads, params, alpha=0.1)\n")], formula),
    "eps inside the root": (reference_adamw, [(ROOT, INSIDE)], all_heads(eps=1e-3, betas=(0.0, 0.99))),
    "no eps": (reference_adamw, [("    torch._foreach_add_(roots, hyper.eps)\n", "")], all_heads(eps=1e-3)),
    "no first bias correction": (updates, [("lr / (1 - beta1**step)", "lr")], formula),
    "no second bias correction": (updates, [("(1 - beta2**step) ** 0.5", "1.0")], formula),
    "the step counted from zero": (arguments, [("Hyper.of(group, age + 1)", "Hyper.of(group, max(age, 1))")], formula),
    "betas swapped in the weights": (updates, [("1 - beta1, beta2", "1 - beta2, beta2")], formula),
    "first moments do not decay": (reference_adamw, [("torch._foreach_lerp(exp_avgs, grads, hyper.weight1)",
                                                      "torch._foreach_add(exp_avgs, grads, alpha=hyper.weight1)")], formula),
    "maximize ignored": (updates, [('-1.0 if group["maximize"] else 1.0', "1.0")], all_heads(maximize=True)),
    "the running maximum is a minimum": (reference_adamw, [("_foreach_maximum", "_foreach_minimum")],
                                         all_heads(amsgrad=True)),
    "the mask lost": (updates, [("matrix(tensor).narrow(self.dim, self.start, self.stop - self.start)",
                                 "matrix(tensor).narrow(self.dim, 0, self.stop - self.start)")], frozen),
    "the last block skipped": (state, [("        return tuple(blocks)\n", "        return tuple(blocks[:-1])\n")], masked),
    "rows of state one block off": (state, [("at + (top - first) * other, other", "at, other")], reselected),
    "columns of state one block off": (state, [("Block(1, top, end, at + top - first", "Block(1, top, end, at")],
                                       reselected),
    "joining elements inherit the age": (state, [("ages += [age[edge] for edge in edges[:-1]]",
                                                  "ages += [max(age) for edge in edges[:-1]]")], reselected),
    "moments lost on reselection": (state, [("new.cut(old.spread(value))", "new.cut(old.spread(value) * 0)")],
                                    reselected),
    "frozen parameters have state": (optimizer, [("chosen.pop(id(param), None)\n",
                                                  "chosen.pop(id(param), None) or whole(name, param)\n")], frozen),
    "found_inf ignored": (optimizer, [("if float(found_inf) != 0:", "if False:")],
                          test_optimizer_precision.test_found_inf_moves_nothing_and_takes_no_step),
    "found_inf takes a step": (optimizer, [("            if float(found_inf) != 0:\n",
                                            "            if float(found_inf) != 0:\n"
                                            "                [state[\"step\"].add_(1) for state in arguments.states]\n")],
                               test_optimizer_precision.test_found_inf_moves_nothing_and_takes_no_step),
    "grad_scale ignored": (optimizer, [("factor = factor / torch.as_tensor(scale", "factor / torch.as_tensor(scale")],
                           lambda: test_optimizer_precision.test_grad_scale_divides_the_gradients(None)),
    "the norm counts everything": (reference_adamw, [("block.of(u.grad) if block is not None else u.grad", "u.grad")],
                                   test_optimizer.test_max_grad_norm_counts_the_selected_slices_alone),
    "gradients checked too late": (optimizer, [("        check_grad(slot)\n", "")],
                                   lambda: test_optimizer.test_a_fault_in_the_last_parameter_moves_none(
                                       lambda p: setattr(p["bias"], "grad", torch.zeros(48).to_sparse()),
                                       RuntimeError, "sparse gradients: that of bias")),
    "the cast to the parameter's dtype on loading": (saved_state, [("slot.placed(held.to(device=slot.param.device))\n",
                                                              "slot.placed(held.to(device=slot.param.device, dtype=slot.param.dtype))\n")],
                                                    resume("split", torch.float32)),
    "the seed not restored": (saved_state, [('        seed = saved["alps"]["seed"]\n', "")],
                              resume("stochastic", torch.bfloat16)),
    "other ranges accepted": (saved_state, [('"dim", "ranges", "mirrored", "master"', '"dim", "mirrored", "master"')], refused("other rows")),
    "other masters accepted": (saved_state, [('"mirrored", "master", "moment_dtype")\n', '"mirrored", "moment_dtype")\n')],
                               refused("master")),
    "loaded state shared with the file": (saved_state, [("held = slot.cut(share_of(slot.param, value)) if slot.part.full",
                                                   "held = value if slot.part.full")],
                                          test_optimizer_state.test_loading_does_not_share_memory_with_the_file),
    "the lower half lost": (reference_rounding, [("(bits - (high << 16)).to(torch.int16)", "torch.zeros_like(bits, dtype=torch.int16)")],
                            test_optimizer_precision.test_split_bfloat16_is_a_bijection),
    "truncated instead of rounded": (reference_rounding, [("high = (bits + 0x8000) >> 16", "high = bits >> 16")],
                                     test_optimizer_precision.test_the_bfloat16_half_is_the_nearest_and_nans_stay),
    "stochastic rounding always up": (reference_rounding, [("((raw + noise) & -0x10000)", "((raw + 0xFFFF) & -0x10000)")],
                                      rounding),
    "philox of nine rounds": (reference_rounding, [("for _ in range(10):", "for _ in range(9):")],
                              test_optimizer_precision.test_random_bits_are_philox),
    "random bits of every step the same": (reference_rounding, [("torch.full_like(group, step & MASK32)",
                                                                 "torch.full_like(group, 1)")],
                                           test_optimizer_precision.test_random_bits_are_philox),
    "second moments to nearest": (reference_adamw, [("yield target, value if noise is None else round_stochastically(value, noise, target.dtype)",
                                                     "yield target, value")],
                                  test_optimizer_precision.test_bfloat16_second_moments_do_not_stall),
    "the last tile skipped": (adamw_tables, [("at = torch.arange(0, n, TILE, dtype=torch.int64)",
                                              "at = torch.arange(0, n, TILE, dtype=torch.int64)[:-1]")], tiles),
    "tiles past the end": (adamw_tables, [("(n - at).clamp(max=TILE)", "(n - at) * 0 + TILE")], tiles),
    "tiles begin at column 0": (adamw_tables, [("at % max(width, 1)\n", "at * 0\n")], tiles),
    "scales of the tiles before": (adamw_tables, [('tiles["scale"] += at // QUANTUM', 'tiles["scale"] += 0')], tiles),
    "scales of the blocks before": (adamw_tables, [("        scale += n_scales(block, update.param)\n", "        scale += 1\n")],
                                    tiles),
    "the mirror's place is the leaf's": (state, [("first + low - at))", "low))")],
                                         test_adamw_tables.test_tiles_of_a_leaf_find_its_elements_in_the_full_weight),
    "the gradient's stride taken from the parameter": (adamw_tables, [("matrix(update.grad).stride(0)",
                                                                       "matrix(update.param).stride(0)")], tiles),
    "alignment taken for granted": (adamw_tables, [("(tiles[:, LENGTHS] % VECTOR).any()", "False")], alignment),
    "stale addresses": (head_adamw, [("        if flat == self.pointers:\n", "        if flat:\n")],
                        test_adamw_tables.test_a_plan_is_kept_and_its_addresses_follow),
    "a plan kept for other strides": (head_adamw, [("known.layout == layout and ", "")],
                                      test_adamw_tables.test_a_plan_is_kept_and_its_addresses_follow),
    # -- the warm step: one line of the quick look lost --
    "step counts not looked at": (arguments, [(" and self.counts._version != self.version)", " and False)")],
                                  changed("a step count written in place")),
    "states not looked at": (arguments, [("changes != ParamState.changes or", "")], changed("a moment replaced")),
    "lost states not looked at": (arguments, [("len(state) != len(entries) or not all(map(is_, entries, state.values()))", "False")],
                                  changed("all states lost")),
    "groups not looked at": (arguments, [("""sum([len(g["params"]) for g in groups]) != len(params)
                or not all(map(is_, params, chain.from_iterable([g["params"] for g in groups])))""", "False")],
                             changed("a parameter taken out of its group")),
    "amsgrad not looked at": (arguments, [('[g["amsgrad"] for g in groups] != amsgrad', "False")], changed("amsgrad off")),
    "strides not looked at": (arguments, [("return self.guards.check(*tensors)", "return None not in map(type, tensors)")],
                              changed("a gradient of other strides")),
    "weights' addresses not looked at": (arguments, [("!= fixed:", "is fixed:")], changed("weights elsewhere")),
    "new gradients not looked at": (arguments, [(" or any(p.grad is not None for p in self.absent)", "")],
                                    test_arguments.test_a_gradient_that_appears_is_seen),
    "the mirror not looked at": (arguments, [("mirror.weight is not update.mirror or not mirror.writable(update.param)", "False")],
                                 test_arguments.test_a_mirror_whose_weight_was_replaced_is_left_to_the_projection),
    "numbers of the last step": (arguments, [("self.aged = [(group, age + 1) for", "self.aged = [(group, age) for")], formula),
    # -- 8-bit moments --
    "8-bit second moments to nearest": (reference_codes, [("    if bits is None:\n", "    if True:\n")],
                                        test_optimizer_8bit.test_second_moments_neither_stall_nor_stick),
    "small second moments lost": (reference_codes, [("code.clamp_(min=1)", "code")], errors),
    "square roots for fourth roots": (reference_codes, [("x.sqrt().sqrt_()", "x.sqrt()")], errors),
    "half the codes": (reference_codes, [("/ codes\n", "/ codes * 2\n")], errors),
    "a scale for 128": (reference_codes, [("(0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)",
                                           "(0, -flat.numel() % 128)).view(-1, 128)")], errors),
    "the sign lost": (reference_codes, [("torch.copysign(square.square_(), code)", "square.square_()")], errors),
    "an infinity hidden": (reference_codes, [('nan=float("inf"), posinf=float("inf")', "nan=0.0, posinf=1.0")],
                           test_optimizer_8bit.test_what_is_not_finite_stays_so_and_in_its_64),
    "codes carried as moments": (state, [("old.decoded(state).items() if", "state.items() if")], carried),
    "dense states of codes": (optimizer, [("slots[index].decoded(entry).items()", "entry.items()")],
                              test_optimizer_8bit.test_dense_state_goes_out_and_comes_in),
    "scales of the first block": (reference_adamw, [("if block in blocks]", "if block in blocks][:1] * len(blocks)")],
                                  resume_8bit),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch):
    module, edits, check = FAULTS[name]
    plant(monkeypatch, module, *edits)
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check()


def test_checks_are_green_without_a_fault():
    for check in {id(check): check for _, _, check in FAULTS.values()}.values():
        check()
