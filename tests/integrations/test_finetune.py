"""The paper's loop as a function: its three stages, what they leave, and where it goes on."""

import copy
import json

import pytest
import torch
from transformers import Trainer

import alps_kernels as alps
from alps_kernels.integrations import finetune

from .cases import arguments, assert_only_moved, assert_same, data, model

pytestmark = [pytest.mark.filterwarnings("error::DeprecationWarning"), pytest.mark.filterwarnings("error::FutureWarning")]


def args(folder, **changes):
    return arguments(folder, **{"max_steps": 4, "save_steps": 1, **changes})


def run(folder, of=None, **options):
    of = model() if of is None else of
    return alps.alps_finetune(of, data(), folder, **{"args": args(folder), "task_share": 0.5, "ratio": 0.25, **options})


@pytest.mark.parametrize("kind, dtype, sliced", [("llama", torch.float32, False), ("qwen2", torch.bfloat16, True)])
def test_the_three_stages(kind, dtype, sliced, tmp_path):
    made = run(tmp_path, model(kind, dtype), sliced=sliced)
    base = model(kind, dtype)
    task = type(base).from_pretrained(tmp_path / "task" / "model")
    assert all((a != b).any() for a, b in zip(task.parameters(), base.parameters(), strict=True) if a.ndim == 2)
    assert torch.equal(alps.score_heads(base, task).tensor, made.scores.tensor)
    assert made.heads == made.scores.top(0.25)
    assert_only_moved(made.model, base, made.heads.bind(made.model))
    assert type(made.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert_same(type(base).from_pretrained(tmp_path / "heads" / "model"), made.model)
    assert alps.HeadSelection.load(tmp_path / "alps_heads.json") == made.heads
    kept = json.loads((tmp_path / "alps_run.json").read_text())
    assert kept == made.provenance and kept["stages"]["task"]["examples"] == 24
    assert kept["stages"]["heads"]["alps_trained"] == sum(made.heads.count().trained.values())


class Stop(Exception):
    pass


def stopping(stage, step):
    class Stopping(Trainer):
        def training_step(self, *args, **kwargs):
            if f"/{stage}" in self.args.output_dir and self.state.global_step == step:
                raise Stop
            return super().training_step(*args, **kwargs)

    return Stopping


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    folder = tmp_path / "stopped"
    for trainer in (stopping("task", 2), stopping("heads", 0), stopping("heads", 3)):
        with pytest.raises(Stop):
            run(folder, trainer=trainer)
    made = run(folder)
    assert_same(made.model, whole.model)
    assert made.provenance["stages"]["task"]["resumed_from"] == "checkpoint-2"
    assert made.provenance["stages"]["heads"]["resumed_from"] == "checkpoint-3"
    monkeypatch.setattr(Trainer, "train", None)  # nothing is left to train
    again = run(folder)
    assert_same(again.model, whole.model)
    assert again.heads == whole.heads and torch.equal(again.scores.tensor, whole.scores.tensor)


def test_a_task_model_that_is_there(tmp_path):
    task = model()
    with torch.no_grad():
        task.model.layers[1].self_attn.q_proj.weight[16:24] += 0.1  # head 2
    made = run(tmp_path, task_model=task, ratio=0.125, representation="q")
    assert list(made.heads) == [(1, 2)] and "task" not in made.provenance["stages"]


@pytest.mark.parametrize("change, message", [
    ({"ratio": 0.5}, "holds a run with ratio 0.25, this one has 0.5"),
    ({"of": model("llama", seed=3)}, "holds a run with base '"),
    ({"args": args("x", learning_rate=1.0)}, "with args.learning_rate 0.01, this one has 1.0"),
])
def test_another_run_in_the_folder_is_refused(change, message, tmp_path):
    with pytest.raises(Stop):
        run(tmp_path, trainer=stopping("task", 0))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **change)


@pytest.mark.parametrize("options, error, message", [
    ({"of": "a/path"}, TypeError, "model is a str"), ({"ratio": 0}, ValueError, "no head would train"),
    ({"task_share": 0}, ValueError, "task_share is 0"), ({"metric": "l7"}, ValueError, "metric is 'l7'"),
    ({"rest": "half"}, ValueError, "rest is 'half'"), ({"kv": "some"}, ValueError, "kv is 'some'")])
def test_bad_options_are_refused_before_anything_is_written(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_dataset_without_a_length_has_no_share(tmp_path):
    endless = iter(data())
    with pytest.raises(ValueError, match="has no length"):
        alps.alps_finetune(model(), endless, tmp_path / "new")


def test_the_defaults_are_the_papers(tmp_path):
    recipe = finetune.paper_arguments(tmp_path, use_cpu=True)
    assert recipe.learning_rate == 2e-5 and recipe.weight_decay == 0.1 and recipe.num_train_epochs == 3
    assert (recipe.adam_beta1, recipe.adam_beta2) == (0.9, 0.999)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 128
    made = Trainer(model(), recipe, train_dataset=data())
    alps.use_heads(made, alps.HeadSelection([(0, 0)], [4, 4]))
    made.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.lr_scheduler.step()
    assert rates[0] == 0 and rates[10] == pytest.approx(2e-5) == max(rates)  # a tenth of the steps to warm up
    assert rates[5] == pytest.approx(1e-5) and rates[55] == pytest.approx(1.1e-5) and rates[-1] == pytest.approx(2e-6, rel=0.01)


def test_the_share_of_the_data_is_drawn_by_the_seed():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": list(range(40))})
    drawn = [finetune._share(rows, 0.25, seed)["x"][:] for seed in (0, 0, 1)]
    assert list(drawn[0]) == list(drawn[1]) != list(drawn[2]) and len(set(drawn[0])) == 10
    assert list(finetune._share(list(range(40)), 0.25, 0)) == list(drawn[0])
    assert len(finetune._share([1, 2, 3], 0.01, 0)) == 1


def test_the_data_of_the_task_is_part_of_the_whole(tmp_path):
    seen = []

    class Seeing(Trainer):
        def __init__(self, *given, **options):
            seen.append(options["train_dataset"])
            super().__init__(*given, **options)

    base = copy.deepcopy(model())
    run(tmp_path, base, trainer=Seeing)
    assert [len(dataset) for dataset in seen] == [24, 48]
