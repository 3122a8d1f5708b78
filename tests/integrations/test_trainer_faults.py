"""Every fault planted in what stands between the Trainer and the optimizer turns a check red."""

import pytest
import torch

from alps_kernels.integrations import callback, finetune, resume as resuming, start_weights, trainer as using
from tests.integrations import test_callback, test_finetune, test_trainer

from ..support.mutants import plant


def switch(kind="llama", keep="base", **options):
    return lambda folder: test_callback.test_the_switch(kind, options, keep, folder)


def resume(**case):
    return lambda folder: test_callback.test_resume_before_at_and_after_the_switch_is_bit_equal(case, folder)


def clip(folder):
    test_trainer.test_clipping_and_the_logged_norm_count_what_trains_alone(folder)


def given(folder):
    test_trainer.test_arguments_of_the_trainer_reach_the_optimizer(folder)


def share(folder):
    test_trainer.test_what_trains_is_logged_once_and_honestly(False, folder)


def masters(folder):
    test_callback.test_weights_of_16_bits_are_scored_with_their_masters(folder)


def missed(folder):
    test_callback.test_what_a_resume_needs_is_missed_by_name(folder)


def follow(folder):
    test_callback.test_the_optimizer_follows_a_narrower_state_before_its_first_step_alone()


def stages(folder):
    test_finetune.test_the_three_stages("llama", torch.float32, False, folder)


FAULTS = {
    "the norm counts everything": (using, "for block in part.blocks(part.param.grad)]", "for block in [part.param.grad]]", clip),
    "never clipped": (using, 'if max_norm != float("inf")', "if False", clip),
    "betas of the optimizer's own": (using, '"betas": (args.adam_beta1, args.adam_beta2), ', "", given),
    "eps of the optimizer's own": (using, ', "eps": args.adam_epsilon}', "}", given),
    "said at every resume": (using, "if state.global_step == 0:", "if True:", lambda folder: (
        test_trainer.test_resume_is_bit_equal("float32", folder))),
    "whole parameters counted as trained": (callback, '"alps_trained": bound.numel,',
                                            '"alps_trained": sum(p.param.numel() for p in bound.params),', share),
    "nothing restored": (callback, 'if options["restore"] == "base":', "if False:", switch()),
    "restored where it should be kept": (callback, 'if options["restore"] == "base":', "if True:", switch(keep="keep")),
    "kept heads restored too": (start_weights, "intersect(part.ranges, complement(keep.get(part.name, ()), part.extent))",
                                "part.ranges", switch()),
    "restored to the wrong rows": (start_weights, "lost.blocks(start[part.name])", "[b.roll(1, 0) for b in lost.blocks(start[part.name])]",
                                   switch()),
    "the state not shrunk": (callback, "        optimizer.set_heads(kept)\n", "", switch()),
    "gradients of dropped heads still wanted": (callback, "        self._narrow(args, model)\n", "", switch(ratio=0.125)),
    "scored against itself": (callback, "base.replace(self._start)", "base.replace({})", switch()),
    "the lowest heads kept": (callback, 'heads = scores.top(options["ratio"], ', 'heads = ~scores.top(1 - options["ratio"], ',
                              switch()),
    "scored without masters": (callback, "{} if optimizer is None else masters(optimizer, self._start)", "{}", masters),
    "masters joined in the wrong place": (resuming, "part.spread(low.reshape(-1), dense)",
                                          "part.spread(low.reshape(-1).flip(0), dense)", masters),
    "the switch one step late": (callback, 'state.global_step >= self.options["warmup_steps"]',
                                 'state.global_step > self.options["warmup_steps"]', switch()),
    "the start taken on resume": (callback, 'read_start(os.path.join(args.output_dir, START_FILE), self.saved["digest"], warm, self._home)',
                                  "{part.name: part.param.detach().clone() for part in warm.params}", resume()),
    "the selection forgotten on resume": (callback, 'if self.saved["heads"] is not None:', "if False:",
                                          resume(options={"restore": "keep"})),
    "the digest not compared": (start_weights, "if digest_of_tensors(start) != expected or ", "if ", missed),
    "the file's selection not followed": (resuming, "None if self.state else self._narrower(state_dict)", "None", resume()),
    "followed in the middle of a run": (resuming, "None if self.state else self._narrower(state_dict)", "self._narrower(state_dict)", follow),
    "followed out of what trains": (resuming, "or not _within(part, ours[param])", "", follow),
    "the task model is the base": (finetune, "task = copy.deepcopy(base)", "task = base", stages),
    "the heads' run sees the share alone": (finetune, "_fit_heads(model, heads, train_dataset,", "_fit_heads(model, heads, train_dataset[:24],",
                                            test_finetune.test_the_data_of_the_task_is_part_of_the_whole),
    "stages done again": (finetune, 'return stage in self.document["stages"]', "return False",
                          lambda folder: test_finetune.test_it_goes_on_where_it_was_stopped(folder, pytest.MonkeyPatch())),
}


SLOW = ("stages done again", "the digest not compared", "the start taken on resume")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAULTS])
def test_fault_is_seen(name, monkeypatch, tmp_path):
    module, old, new, check = FAULTS[name]
    plant(monkeypatch, module, (old, new))
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check(tmp_path)
