"""TRL's SFTTrainer on heads alone and in one run, with its own defaults: bfloat16 autocast, checkpointed activations."""

import copy
import functools

import pytest
import torch

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import tiny_model
from tests.support import real_models

from .cases import adamw, assert_only_moved, assert_same

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


@functools.cache
def rows():
    problems, _ = chain_sum.split(n_train=32, n_test=0)
    return datasets.Dataset.from_dict({"prompt": [problem.prompt for problem in problems],
                                       "completion": [" " + problem.answer for problem in problems]})


def trainer(model, tokenizer, folder, **changes):
    args = trl.SFTConfig(str(folder), **{"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
                                         "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, **changes})
    return trl.SFTTrainer(model=model, args=args, train_dataset=rows(), processing_class=tokenizer)


def tiny():
    torch.manual_seed(0)
    return tiny_model()


@pytest.mark.parametrize("sliced", [False, True])
def test_heads_alone_and_resumed(sliced, tmp_path):
    def run(resume=None, **changes):
        model, tokenizer = tiny()
        heads = alps.HeadSelection([(0, 1), (2, 5)], [8] * 4)
        if sliced:
            alps.slice_heads(model, heads)
        made = trainer(model, tokenizer, tmp_path, **changes)
        alps.use_heads(made, None if sliced else heads)
        made.train(resume_from_checkpoint=resume)
        return made, heads

    whole, heads = run()
    resumed, _ = run(str(tmp_path / "checkpoint-2"), save_strategy="no")
    assert_same(resumed.model, whole.model)
    assert_same(adamw(resumed).state_dict(), adamw(whole).state_dict())
    if sliced:
        alps.unslice_heads(whole.model)
    assert_only_moved(whole.model, tiny()[0], heads.bind(whole.model))
    assert any("alps_trained" in row for row in whole.state.log_history)


def test_one_run_and_resumed(tmp_path):
    def run(resume=None, **changes):
        model, tokenizer = tiny()
        made = trainer(model, tokenizer, tmp_path, **changes)
        callback = alps.AlpsCallback(0.10, 2)
        alps.use_heads(made, callback)
        made.train(resume_from_checkpoint=resume)
        return made, callback

    whole, callback = run()
    assert_only_moved(whole.model, tiny()[0], callback.heads.bind(whole.model))
    for step in (1, 3):
        resumed, again = run(str(tmp_path / f"checkpoint-{step}"), save_strategy="no")
        assert again.heads == callback.heads
        assert_same(resumed.model, whole.model)


@pytest.mark.real
def test_smollm2_in_one_run_and_resumed(tmp_path):
    """The first 4 of SmolLM2's layers in bfloat16: 4 of 36 heads after two steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = real_models.smollm2()

    def run(resume=None):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, num_hidden_layers=4)
        before = copy.deepcopy(model)
        made = trainer(model, AutoTokenizer.from_pretrained(folder), tmp_path, save_total_limit=2, save_steps=2)
        callback = alps.AlpsCallback(0.10, 2)
        alps.use_heads(made, callback)
        made.train(resume_from_checkpoint=resume)
        return made, before, callback

    whole, before, callback = run()
    assert len(callback.heads) == 4
    assert_only_moved(whole.model, before, callback.heads.bind(whole.model))
    resumed, _, _ = run(str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model, whole.model)
