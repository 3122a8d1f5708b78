"""Every fault planted in the optimizer turns the check that is named beside it red."""

import pytest
import torch
from torch import nn

from alps_kernels.ops.adamw import cpu, launch, op, param_update, plan, quantize8, rounding, tables
from alps_kernels.optim import groups, head_adamw, state, state_dict, step_cache
from alps_kernels.selection import BoundParam
from tests.ops import test_adamw_tables
from tests.optim import (
    cases, test_8bit, test_capturable, test_driver, test_head_adamw, test_precision, test_state_dict, test_step_cache,
)

from ..support.mutants import plant

formula = test_head_adamw.test_float32_equals_the_formula_in_float64
masked = test_head_adamw.test_selected_slices_equal_torch_with_a_mask
tiles = test_adamw_tables.test_tiles_cover_the_selection_exactly_once
graph = test_driver.test_a_graph_and_steps_beside_it_read_their_own_gradients
streams = test_driver.test_another_stream_waits_and_keeps_the_tables


def frozen():
    test_head_adamw.test_every_byte_outside_the_selection_stays(torch.float32, float("nan"))


def reselected():
    test_state_dict.test_reselection_keeps_what_stays_and_starts_afresh_what_joins(
        torch.float32, "split", torch.float32)


def alignment():
    part = BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((30, 64),))
    test_adamw_tables.test_alignment_is_found(lambda: part, False)


def unbiased():
    test_precision.test_stochastic_rounding_is_unbiased_and_goes_to_neighbours(torch.bfloat16)


def all_heads(**options):
    return lambda: test_head_adamw.test_all_parameters_equal_torch_over_50_steps(options)


def resume(master, moments):
    return lambda: test_state_dict.test_resume_is_bit_equal_and_keeps_dtypes(torch.bfloat16, master, moments, 4)


def refused(name):
    case, message = next((c, m) for n, c, m in test_state_dict.refusals() if n == name)
    return lambda: test_state_dict.test_state_of_another_selection_or_precision_is_refused_whole(case, message)


def counted():
    test_capturable.test_it_is_torchs_adamw_as_lr_changes(test_capturable.OPTIONS[0], False)


def skipped(clip):
    return lambda: test_capturable.test_found_inf_moves_nothing_and_takes_no_step(clip, torch.float32)


def changed(name):
    return lambda: test_step_cache.test_a_change_is_seen(name)


def errors():
    test_8bit.test_errors_are_as_stated()


def carried():
    test_8bit.test_reselection_carries_what_stays(torch.float32)


def resume_8bit():
    """The moments after a step are those of the gradient, in every block."""
    params, bound = cases.toy()
    one = cases.make(params, bound, moment_dtype="8bit")
    cases.run(params, one, bound, 1)
    for part in bound.params:
        moments = one._slots[part.param].decoded(one.state[part.param])["exp_avg"].reshape(-1)
        torch.testing.assert_close(moments, 0.1 * part.cut(part.param.grad), rtol=0.2, atol=2e-3)


MUL = "    p = p * hyper.decay\n"
NO_DECAY = "    p = p * 1.0\n"
LAST = "    return p.addcdiv_(m, root, value=-hyper.step_size), m,"
LATE = "    return p.addcdiv_(m, root, value=-hyper.step_size).mul_(hyper.decay), m,"
ROOT = "(v if v_max is None else v_max).sqrt()"
INSIDE = "(v + hyper.eps).sqrt()"

FAULTS = {
    "no decay": (cpu, [(MUL, NO_DECAY)], formula),
    "decay after the update": (cpu, [(MUL, NO_DECAY), (LAST, LATE)], formula),
    "decay in the gradient": (cpu, [(MUL, NO_DECAY + "    g = g + 0.1 * p\n")], formula),
    "eps inside the root": (cpu, [(ROOT, INSIDE)], all_heads(eps=1e-3, betas=(0.0, 0.99))),
    "no eps": (cpu, [(".add_(hyper.eps)", "")], all_heads(eps=1e-3)),
    "no first bias correction": (param_update, [("lr / (1 - beta1**step)", "lr")], formula),
    "no second bias correction": (param_update, [("(1 - beta2**step) ** 0.5", "1.0")], formula),
    "the step counted from zero": (step_cache, [("HyperRow.of(group, age + 1)", "HyperRow.of(group, max(age, 1))")], formula),
    "betas swapped in the weights": (param_update, [("1 - lr * group[\"weight_decay\"], 1 - beta1, beta2", "1 - lr * group[\"weight_decay\"], 1 - beta2, beta2")], formula),
    "first moments do not decay": (cpu, [("m.lerp(g, hyper.weight1)", "m.add(g, alpha=hyper.weight1)")], formula),
    "maximize ignored": (param_update, [('-1.0 if group["maximize"] else 1.0, step)', "1.0, step)")], all_heads(maximize=True)),
    "the running maximum is a minimum": (cpu, [("torch.maximum", "torch.minimum")], all_heads(amsgrad=True)),
    "the mask lost": (param_update, [("matrix(tensor).narrow(self.dim, self.start, self.stop - self.start)",
                                 "matrix(tensor).narrow(self.dim, 0, self.stop - self.start)")], frozen),
    "the last block skipped": (state, [("        return tuple(blocks)\n", "        return tuple(blocks[:-1])\n")], masked),
    "rows of state one block off": (state, [("(at + (top - first) * other, other)", "(at, other)")], reselected),
    "columns of state one block off": (state, [("(at + top - first, last - first)", "(at, last - first)")], reselected),
    "joining elements inherit the age": (groups, [("ages += [age[edge] for edge in edges[:-1]]",
                                                   "ages += [max(age) for edge in edges[:-1]]")], reselected),
    "moments lost on reselection": (groups, [("new.cut(old.spread(value))", "new.cut(old.spread(value) * 0)")],
                                    reselected),
    "frozen parameters have state": (groups, [("chosen.pop(id(param), None)\n",
                                                  "chosen.pop(id(param), whole)\n")], frozen),
    "found_inf ignored": (head_adamw, [("updates if float(found_inf) == 0 else []", "updates")],
                          test_precision.test_found_inf_moves_nothing_and_takes_no_step),
    "found_inf takes a step": (head_adamw, [("updates = updates if float(found_inf) == 0 else []",
                                             "[state[\"step\"].add_(float(found_inf) != 0) for state in cache.states]; "
                                             "updates = updates if float(found_inf) == 0 else []")],
                               test_precision.test_found_inf_moves_nothing_and_takes_no_step),
    "grad_scale ignored": (param_update, [("1.0 / float(self.grad_scale)", "1.0")],
                           lambda: test_precision.test_grad_scale_divides_the_gradients(None)),
    "the norm counts everything": (cpu, [("block.of(u.grad) if block is not None else u.grad", "u.grad")],
                                   test_head_adamw.test_max_grad_norm_counts_the_selected_slices_alone),
    "gradients checked too late": (step_cache, [("                check_grad(slot)\n", "")],
                                   lambda: test_head_adamw.test_a_fault_in_the_last_parameter_moves_none(
                                       lambda p: setattr(p["bias"], "grad", torch.zeros(48).to_sparse()),
                                       RuntimeError, "sparse gradients: that of bias")),
    "the cast to the parameter's dtype on loading": (state_dict, [("slot.placed(held.to(device=slot.param.device))\n",
                                                              "slot.placed(held.to(device=slot.param.device, dtype=slot.param.dtype))\n")],
                                                    resume("split", torch.float32)),
    "the seed not restored": (state_dict, [('        seed = saved["alps"]["seed"]\n', "")],
                              resume("stochastic", torch.bfloat16)),
    "other ranges accepted": (state_dict, [('"dim", "ranges", "mirrored", "master"', '"dim", "mirrored", "master"')], refused("other rows")),
    "other masters accepted": (state_dict, [('"mirrored", "master", "moment_dtype")\n', '"mirrored", "moment_dtype")\n')],
                               refused("master")),
    "loaded state shared with the file": (state_dict, [("held = slot.cut(share_of(slot.param, value)) if slot.part.full",
                                                   "held = value if slot.part.full")],
                                          test_state_dict.test_loading_does_not_share_memory_with_the_file),
    "the lower half lost": (rounding, [("(bits - (high << 16)).to(torch.int16)", "torch.zeros_like(bits, dtype=torch.int16)")],
                            test_precision.test_split_bfloat16_is_a_bijection),
    "truncated instead of rounded": (rounding, [("high = (bits + 0x8000) >> 16", "high = bits >> 16")],
                                     test_precision.test_the_bfloat16_half_is_the_nearest_and_nans_stay),
    "stochastic rounding always up": (rounding, [("((raw + noise) & -0x10000)", "((raw + 0xFFFF) & -0x10000)")], unbiased),
    "philox of nine rounds": (rounding, [("for _ in range(10):", "for _ in range(9):")],
                              test_precision.test_random_bits_are_philox),
    "random bits of every step the same": (rounding, [("torch.full_like(group, step & MASK32)",
                                                                 "torch.full_like(group, 1)")],
                                           test_precision.test_random_bits_are_philox),
    "second moments to nearest": (cpu, [("yield v, rounded(wide_v, EXP_AVG_SQ_BITS, v.dtype)", "yield v, wide_v")],
                                  test_precision.test_bfloat16_second_moments_do_not_stall),
    "the last tile skipped": (tables, [("at = torch.arange(0, n, TILE, dtype=torch.int64, device=\"cpu\")",
                                              "at = torch.arange(0, n, TILE, dtype=torch.int64, device=\"cpu\")[:-1]")], tiles),
    "tiles past the end": (tables, [("(n - at).clamp(max=TILE)", "(n - at) * 0 + TILE")], tiles),
    "tiles begin at column 0": (tables, [("at % max(width, 1)\n", "at * 0\n")], tiles),
    "scales of the tiles before": (tables, [('tiles["scale"] += at // QUANTUM', 'tiles["scale"] += 0')], tiles),
    "scales of the blocks before": (state, [("scale += n_scales((end - top) * other)", "scale += 1")], tiles),
    "the copy's place is the leaf's": (state, [("first + low - at))", "low))")],
                                         test_adamw_tables.test_tiles_of_a_leaf_find_its_elements_in_the_full_weight),
    "the gradient's stride taken from the parameter": (tables, [("matrix(update.grad).stride(0)",
                                                                       "matrix(update.param).stride(0)")], tiles),
    "alignment taken for granted": (tables, [("(tiles[:, LENGTHS] % VECTOR).any()", "False")], alignment),
    "stale addresses": (plan, [("            self.pointers = flat\n", "            pass\n")],
                        test_adamw_tables.test_a_plan_is_kept_and_its_addresses_follow),
    "a plan kept for other strides": (op, [("known.layout == layout and ", "")],
                                      test_adamw_tables.test_a_plan_is_kept_and_its_addresses_follow),
    # -- the warm step: one line of the quick look lost --
    "step counts not looked at": (step_cache, [(" and self.counts._version != self.version)", " and False)")],
                                  changed("a step count written in place")),
    "states not looked at": (step_cache, [("changes != self.changes.count or", "")], changed("a moment replaced")),
    "another table of states not looked at": (step_cache, [(" or table is not state", "")], changed("all states replaced")),
    "groups not looked at": (step_cache, [("len(now) != len(params) or not all(map(is_, now, params))", "False")],
                             changed("a parameter taken out of its group")),
    "amsgrad not looked at": (step_cache, [('group["amsgrad"] != amsgrad', "False")], changed("amsgrad off")),
    "strides not looked at": (step_cache, [("return self.guards.check(*tensors)", "return None not in map(type, tensors)")],
                              changed("a gradient of other strides")),
    "weights' addresses not looked at": (step_cache, [(" if list(map(ADDRESS, self.fixed)) == self.pointers[0] else None", "")], changed("weights elsewhere")),
    "new gradients not looked at": (step_cache, [(" or (self.absent and any([p.grad is not None for p in self.absent]))", "")],
                                    test_step_cache.test_a_gradient_that_appears_is_seen),
    "the copy not looked at": (step_cache, [("""self.adopted != SyncedSlice.adopted or not all(
                map(is_, [one.module._parameters.get(one.name) for one in self.slices], self.copies))""", "False")],
                                 test_step_cache.test_a_copy_whose_weight_was_replaced_is_left_to_the_projection),
    "another dict of a group not looked at": (step_cache, [("group is not known or ", "")], changed("a group replaced by another dict")),
    "states elsewhere not looked at": (step_cache, [("if list(map(ADDRESS, self.sample)) != self.sampled:", "if False:")],
                                       lambda: test_step_cache.test_states_that_moved_are_followed("capturable")),
    "hyperparameters of the last step": (step_cache, [("[(group, age + 1) for", "[(group, age) for")], formula),
    # -- the driver --
    "a graph reads what steps write": (plan, [("self.stage = self._spare()", "self.stage = self.ring[self.turn]")], graph),
    "a graph keeps no memory of its own": (plan, [("self.spares.pop()", "self.spares[-1]")],
                                           test_driver.test_a_graph_with_clipping_copies_once_and_a_second_graph_has_tables_of_its_own),
    "counts made in a capture": (step_cache, [("_joined(members) if alone and not captured else _base(members)", "_joined(members[:])"),
                                              ("    if (counts := _base(states)) is not None:\n        return counts\n", "")],
                                 test_driver.test_a_capture_of_a_step_that_looks_at_everything_counts_where_steps_beside_it_do),
    "counts moved beside a graph": (step_cache, [("if alone and not captured", "if not captured")],
                                    test_driver.test_what_a_graph_reads_stays_where_it_is),
    "a copy that was interrupted counts as made": (launch, [("before, self.written = self.written, None", "before = self.written; self.written = pointers")],
                                                   test_driver.test_an_interrupted_copy_is_made_again),
    "another seed not looked at": (op, [(" or self._known[1:] != (seed, backend)", "")], test_driver.test_another_seed_between_warm_steps),
    "a capture waits": (plan, [("if capturing(self.device):\n            self.stage", "if False:\n            self.stage")], graph),
    "a ring of one": (plan, [("self.turn = (self.turn + 1) % RING", "self.turn = 0")],
                      lambda: test_driver.test_no_step_waits_for_the_one_before({"capturable": True})),
    "addresses of the step before": (plan, [("written is self.pointers:", "written is not None:")],
                                     lambda: test_driver.test_no_step_waits_for_the_one_before({"capturable": True})),
    "no wait for another stream": (launch, [("                self.done.wait()\n", "                pass\n")], streams),
    "tiles not kept for another stream": (plan, [("keep_for_current_stream(part.tiles)", "pass")], streams),
    "tables not kept for another stream": (launch, [("keep_for_current_stream(self.there)", "pass")], streams),
    "versions not counted": (plan, [("        increment_version(self.written)\n", "")],
                             lambda: test_driver.test_weights_count_the_writes({})),
    "versions of full weights not counted": (op, [("(updates[i].param, updates[i].weight_copy)", "(updates[i].param,)")],
                                             test_driver.test_the_full_weight_of_a_slice_counts_them_too),
    "tables sent for each kernel": (plan, [("hypers is not None and self.loaded is hypers", "False")],
                                    test_driver.test_clipping_is_a_copy_two_launches_and_two_small_kernels),
    # -- counts and numbers of the device --
    "bias correction of the first step": (param_update, [("(1 - beta1**steps)", "(1 - beta1 + 0 * steps)")], counted),
    "the second one too": (param_update, [("(1 - beta2**steps).rsqrt_()", "(1 - beta2 + 0 * steps).rsqrt_()")], counted),
    "maximize lost on the device": (param_update, [('-1.0 if group["maximize"] else 1.0, steps)', "1.0, steps)")],
                                    lambda: test_capturable.test_it_is_torchs_adamw_as_lr_changes(test_capturable.OPTIONS[1], False)),
    "weight decay lost on the device": (param_update, [('decay = 1 - group["lr"] * group["weight_decay"]', "decay = 1.0")], counted),
    "found_inf dropped on the device": (step_cache, [("GradControl(grad_scale, found_inf=found_inf)", "GradControl(grad_scale)")], skipped(None)),
    "found_inf dropped beside clipping": (step_cache, [("max_norm, found_inf)\n", "max_norm)\n")], skipped(0.5)),
    "a skipped step is counted": (param_update, [("(found_inf == 0).to(like).reshape(())", "1")],
                                 test_driver.test_under_found_inf_the_device_counts_no_step),
    # -- 8-bit moments --
    "8-bit second moments to nearest": (quantize8, [("    if bits is None:\n", "    if True:\n")],
                                        test_8bit.test_second_moments_neither_stall_nor_stick),
    "small second moments lost": (quantize8, [(".clamp_(min=1)", "")], errors),
    "square roots for fourth roots": (quantize8, [("rows.sqrt().sqrt_()", "rows.sqrt()")], errors),
    "half the codes": (quantize8, [("/ codes\n", "/ codes * 2\n")], errors),
    "a scale for 128": (quantize8, [("(0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)",
                                           "(0, -flat.numel() % 128)).view(-1, 128)")], errors),
    "the sign lost": (quantize8, [("torch.copysign(square.square_(), code)", "square.square_()")], errors),
    "an infinity hidden": (quantize8, [('nan=float("inf"), posinf=float("inf")', "nan=0.0, posinf=1.0")],
                           test_8bit.test_what_is_not_finite_stays_so_and_in_its_64),
    "codes carried as moments": (groups, [("old.decoded(state).items() if", "state.items() if")], carried),
    "dense states of codes": (state_dict, [("slots[index].decoded(entry).items()", "entry.items()")],
                              test_8bit.test_dense_state_goes_out_and_comes_in),
    "scales of the first block": (param_update, [("scales.narrow(0, self.scale, ", "scales.narrow(0, 0, ")],
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
