"""Faults planted in the sliced projections and their synced slices: each turns a named check red."""

import pytest
import torch

import alps_kernels.slicing.model as sliced
import alps_kernels.slicing.projection as projection
import alps_kernels.slicing.weight_grad as head_grad
import alps_kernels.tensors.synced_slices as synced_slices
from tests.slicing import (
    test_life as life, test_refused as refused, test_slice_heads as gradients, test_sync as current,
    test_training as training,
)
from tests.tensors import test_synced_slices as leaves_and_weights

from ..support.mutants import plant


def forward_sees(change, model_type="qwen2"):
    return lambda: current.test_the_next_forward_sees_every_change(model_type, change)


def gradients_of(model_type, *parts):
    return lambda: gradients.test_gradients_are_the_full_ones_cut(model_type, parts or ("q", "k", "v", "o"))


# name: (module, [edits], the check that must fail)
FAULTS = {
    "a copy that never comes": (synced_slices, [("            torch._foreach_copy_(*self._views(weight, leaf))", "            pass")], forward_sees("SGD")),
    "the range before": (synced_slices, [("weight.narrow(self.dim, start, stop - start) for",
                                    "weight.narrow(self.dim, max(start - 1, 0), stop - start) for")],
                         lambda: gradients.test_training_is_training_under_a_mask("llama")),
    "views of storage that is gone": (synced_slices, [("self._cached_views is not None and self._cached_views[0] == key", "self._cached_views is not None")],
                                      current.test_changes_one_after_another),
    "an in-place change unseen": (synced_slices, [("return leaf._version, leaf", "return 0, leaf")], forward_sees("in_place")),
    "new storage unseen": (synced_slices, [("leaf._version, leaf.data_ptr(), weight", "leaf._version, 0, weight")],
                           forward_sees("new_storage")),
    "a moved weight unseen": (synced_slices, [("weight._version, weight.data_ptr()", "weight._version, 0")],
                              forward_sees("weight_moved")),
    "a gradient unseen": (projection, [("            synced.formed = True", "            pass")], forward_sees("by_hand")),
    "a step tells that all is well": (synced_slices, [("            self.formed = formed\n", "")],
                                      forward_sees("clamped_after_a_step")),
    "the grad mode unseen": (synced_slices, [("mode not in (None, self._grad_mode)", "False")],
                             forward_sees("averaged_for_evaluation")),
    "stand-ins taken for the module's own": (synced_slices, [("        if not self.owns(weight, leaf):\n            self._copy",
                                                        "        if False:\n            self._copy")],
                                             current.test_a_weight_that_is_filled_anew_is_current_in_backward_too),
    "backward trusts a refilled weight": (projection, [("            ctx.synced[0].refresh(weight, leaf)", "            pass")],
                                          current.test_a_weight_that_is_filled_anew_is_current_in_backward_too),
    "compiled backward trusts it": (
        projection, [("            return input_grad(dy, weight, leaf, *_edges(trained.weight), trained.dim, trained.transposed)",
                      "            return dy.mm(weight.t() if trained.transposed else weight)")],
        lambda: training.test_compiled_backward_uses_the_leaf_where_the_weight_was_filled_anew("inductor")),
    "compiled code writes nothing": (
        projection, [("                write_slices(full[name], leaves[name], *_edges(synced.ranges), synced.dim)", "                pass")],
        lambda: training.test_eager_code_beside_compiled_code_sees_its_steps("aot_eager")),
    "a stand-in's values stay": (synced_slices, [("            self._stamp = None\n        elif", "        elif")],
                                 current.test_functional_call_uses_what_it_is_given_and_leaves_the_model_alone),
    "every copy is a change": (synced_slices, [("if silent else nullcontext()", "if False else nullcontext()")],
                               current.test_interleaved_micro_batches_are_no_such_case),
    "no copy is a change": (synced_slices, [("if silent else nullcontext()", "if True else nullcontext()")],
                            current.test_a_graph_of_the_weights_before_a_step_is_refused_as_torch_does),
    "always copy": (synced_slices, [("elif self.always or", "elif True or")], current.test_nothing_is_copied_where_nothing_changed),
    "the step's copy left out": (synced_slices, [("            self.copy(weight, leaf)\n            self.formed = formed", "            pass")],
                                 leaves_and_weights.test_a_step_of_any_optimizer_reaches_the_weight_and_nothing_around_it),
    "the saved weight is old": (projection, [("            synced.sync()\n        super()._save", "            pass\n        super()._save")],
                                life.test_the_state_dict_is_the_plain_models),
    "leaves in the state dict": (projection, [("            del destination[prefix + name + LEAF_SUFFIX]", "            pass")],
                                 life.test_the_state_dict_is_the_plain_models),
    "loading forgets the leaf": (projection, [("        local_part(leaf).copy_(held)", "        pass")],
                                 lambda: life.test_loading_a_plain_state_dict_reaches_the_leaves(False)),
    "a move forgets who is who": (projection, [("        self._adopt()\n        return self", "        return self")],
                                  life.test_conversions_that_replace_parameters_are_followed),
    "unslicing keeps old weights": (sliced, [("    sync_weights(model)\n    _restore", "    _restore")],
                                    life.test_requires_grad_and_weights_after_a_silent_change),
    "unslicing trains everything": (sliced, [("            param.requires_grad_(before[name])", "            param.requires_grad_(True)")],
                                    life.test_requires_grad_comes_back_as_it_was_and_not_as_all_true),
    "the first run only": (head_grad, [("for start, stop in ranges]\n    return parts", "for start, stop in ranges[:1] * len(ranges)]\n    return parts")],
                           gradients_of("llama", "q", "k", "v")),
    "a run too far": (head_grad, [("[a.narrow(1, start, stop - start) for", "[a.narrow(1, max(start - 1, 0), stop - start) for")],
                      lambda: gradients.test_every_shape_of_input((5, 10), ((0, 0), (0, 2), (0, 3)))),
    "a gather too far": (head_grad, [("[tensor.narrow(-1, start, stop - start)", "[tensor.narrow(-1, max(start - 1, 0), stop - start)")],
                         gradients_of("llama")),
    "columns of the whole": (projection, [("select_columns(x, trained.weight)", "select_columns(x, ((0, trained.weight[-1][1] - trained.weight[0][0]),))")],
                             gradients_of("llama", "o")),
    "the old weight's dX": (projection, [("return dy.mm(weight.t() if", "return 1.01 * dy.mm(weight.t() if")], gradients_of("bert")),
    "Conv1D taken for Linear": (projection, [('return self.product == "addmm"', "return False")], gradients_of("gpt2")),
    "the bias of all rows": (projection, [("d_bias = select_columns(flat, trained.bias).sum(0)", "d_bias = flat[:, :sum(b - a for a, b in trained.bias)].sum(0)")],
                             gradients_of("qwen2")),
    "x kept whatever trains": (projection, [("        if ctx.needs_input_grad[3]:", "        if True:")],
                               gradients.test_a_bias_or_a_weight_alone),
    "lost gradients pass": (projection, [("            _refuse_lost_gradients()", "            pass")],
                            training.test_reentrant_checkpointing_by_hand),
    "an unfrozen weight passes": (projection, [("                raise RuntimeError(_UNFROZEN", "                RuntimeError(_UNFROZEN")],
                                  lambda: refused.test_a_full_weight_that_is_set_to_train_is_an_error_and_not_a_silence()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_seen(name, monkeypatch):
    module, edits, check = FAULTS[name]
    plant(monkeypatch, module, *edits)
    with pytest.raises((AssertionError, RuntimeError, KeyError, pytest.fail.Exception)):
        check()


@pytest.mark.parametrize("name", FAULTS)
def test_and_without_it_the_check_passes(name):
    FAULTS[name][2]()
    assert torch.is_grad_enabled()
