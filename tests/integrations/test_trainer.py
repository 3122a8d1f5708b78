"""transformers' Trainer on heads alone: what moves, what is clipped, logged, saved and resumed."""

import copy
import json
import os

import pytest
import torch
from transformers import Trainer, TrainerCallback

import alps_kernels as alps
from alps_kernels.integrations import trainer as ours
from tests.support import real_models

from .cases import MODELS, adamw, arguments, assert_only_moved, assert_same, data, model, some_heads, trainer

pytestmark = [pytest.mark.filterwarnings("error::DeprecationWarning"), pytest.mark.filterwarnings("error::FutureWarning")]


def run(folder, kind="llama", dtype=torch.float32, resume=None, options=None, sliced=False, **changes):
    trained = model(kind, dtype)
    if sliced:
        alps.slice_heads(trained, some_heads(trained))
    made = trainer(trained, folder, **changes)
    alps.use_heads(made, None if sliced else some_heads(trained), **options or {})
    made.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return made


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_only_the_heads_move(kind, sliced, tmp_path):
    made = run(tmp_path, kind, sliced=sliced, max_steps=3, save_steps=3)
    before = model(kind)
    saved = type(before).from_pretrained(tmp_path / "checkpoint-3")
    if sliced:
        alps.unslice_heads(made.model)
    assert_same(saved, made.model)  # a checkpoint of a sliced model is an ordinary one
    assert_only_moved(made.model, before, some_heads(before).bind(made.model))


def test_sliced_and_unsliced_runs_are_one_run(tmp_path):
    """Clipped by the same norm: over what trains alone."""
    runs = [run(tmp_path, "qwen2", sliced=sliced, save_strategy="no", max_grad_norm=0.05) for sliced in (False, True)]
    logs = [[(row["loss"], row["grad_norm"]) for row in made.state.log_history if "loss" in row] for made in runs]
    for plain, sliced in zip(*logs, strict=True):
        assert sliced == pytest.approx(plain, rel=1e-5)
    for plain, sliced in zip(*(made.model.state_dict().values() for made in runs), strict=True):
        assert torch.allclose(plain, sliced, atol=2e-5)


RESUMES = {
    "float32": {},
    "bfloat16 with a split master": {"dtype": torch.bfloat16},
    "bfloat16, stochastic, bfloat16 moments": {"dtype": torch.bfloat16,
                                               "options": {"master": "stochastic", "moment_dtype": torch.bfloat16}},
    "autocast, accumulation": {"bf16": True, "gradient_accumulation_steps": 2},
    "checkpointed activations, clipping": {"checkpointing": True, "max_grad_norm": 0.01},
    "sliced": {"sliced": True, "gradient_accumulation_steps": 2},
    "sliced, bfloat16, checkpointed activations": {"sliced": True, "dtype": torch.bfloat16, "checkpointing": True},
    "sliced columns and rows of one weight": {"kind": "gpt2", "sliced": True},
    "fused weights": {"kind": "phi3", "options": {"amsgrad": True}},
}


@pytest.mark.fault("Resume", "Trainer runs resumed from the checkpoint of every step: the same bytes of weights and state, the same log")
@pytest.mark.parametrize("case", RESUMES)
def test_resume_is_bit_equal(case, tmp_path):
    whole = run(tmp_path, **RESUMES[case])
    for step in (2, 5):
        resumed = run(tmp_path, resume=step, save_strategy="no", **RESUMES[case])
        assert_same(resumed.model, whole.model)
        assert_same(adamw(resumed).state_dict(), adamw(whole).state_dict())
        assert [row.get("loss") for row in resumed.state.log_history[:-1]] == [
            row.get("loss") for row in whole.state.log_history[:-1]]
        assert sum("alps_trained" in row for row in resumed.state.log_history) == 1


def test_the_pair_that_transformers_takes_is_the_same_run(tmp_path):
    plain = model()
    bound = some_heads(plain).freeze(plain)
    pair = trainer(plain, tmp_path, optimizer=(alps.HeadAdamW, {"lr": 1e-2, "heads": bound}), max_grad_norm=0.0)
    pair.train()
    assert_same(pair.model, run(tmp_path, max_grad_norm=0.0).model)


def test_arguments_of_the_trainer_reach_the_optimizer(tmp_path):
    made = run(tmp_path, "qwen2", adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6, weight_decay=0.3, save_strategy="no",
               options={"master": None, "seed": 3})
    decayed, plain = made.optimizer.param_groups
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-6 and decayed["weight_decay"] == 0.3
    assert decayed["master"] is None and adamw(made).seed == 3 and decayed["initial_lr"] == 1e-2
    assert plain["weight_decay"] == 0 and all(param.ndim == 1 for param in plain["params"]) and plain["params"]


class Watch(TrainerCallback):
    """The norm over the selection before and after the Trainer clips."""

    def __init__(self, bound):
        self.bound, self.after = bound, []

    def norm(self):
        return torch.cat([part.cut(part.param.grad) for part in self.bound.params]).norm().item()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.after.append(self.norm())


def test_clipping_and_the_logged_norm_count_what_trains_alone(tmp_path):
    def poison(part):
        def hook(param):
            kept = [block.clone() for block in part.blocks(param.grad)]
            param.grad.fill_(float("nan"))
            for block, value in zip(part.blocks(param.grad), kept, strict=True):
                block.copy_(value)
        return hook

    norms = {}
    for limit in (1e9, 1e-3):
        trained = model()
        made = trainer(trained, tmp_path, max_grad_norm=limit, max_steps=1, save_strategy="no")
        bound = alps.use_heads(made, some_heads(trained))
        for part in bound.params:
            part.param.register_post_accumulate_grad_hook(poison(part))
        watch = Watch(bound)
        made.add_callback(watch)
        made.train()
        norms[limit] = next(row["grad_norm"] for row in made.state.log_history if "grad_norm" in row), watch.after[0]
        assert not any(param.isnan().any() for param in trained.parameters())
    logged, unclipped = norms[1e9]
    assert logged == pytest.approx(unclipped, rel=1e-5) and unclipped > 1e-2
    assert norms[1e-3] == (pytest.approx(unclipped, rel=1e-5), pytest.approx(1e-3, rel=1e-2))


@pytest.mark.parametrize("sliced", [False, True])
def test_what_trains_is_logged_once_and_honestly(sliced, tmp_path):
    made = run(tmp_path, sliced=sliced, save_strategy="no")
    row, = [row for row in made.state.log_history if "alps_trained" in row]
    before = model()
    moved = sum(int((value != before.state_dict()[name]).sum()) for name, value in made.model.state_dict().items()
                if name != "lm_head.weight")
    selected = some_heads(before)
    assert row["step"] == 0 and row["alps_heads"] == 2 and row["alps_heads_of"] == 8
    assert moved <= row["alps_trained"] == sum(selected.count().trained.values())
    assert row["alps_trained_of_model"] == row["alps_trained"] / sum(p.numel() for p in before.parameters())
    assert row["alps_trained_of_qkv"] == selected.count().share()


@pytest.mark.parametrize("sliced", [False, True])
def test_the_best_model_is_loaded_and_old_checkpoints_go(sliced, tmp_path):
    trained = model()
    if sliced:
        alps.slice_heads(trained, some_heads(trained))
    made = trainer(trained, tmp_path, max_steps=5, learning_rate=0.3, eval_strategy="steps", eval_steps=1, save_total_limit=2,
                   load_best_model_at_end=True, metric_for_best_model="eval_loss", eval_dataset=data()[:8])
    alps.use_heads(made, some_heads(trained))
    made.train()
    losses = {row["step"]: row["eval_loss"] for row in made.state.log_history if "eval_loss" in row}
    best = min(losses, key=losses.get)
    assert made.state.best_global_step == best
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
    folders = {name for name in os.listdir(tmp_path) if name.startswith("checkpoint-")}
    assert len(folders) <= 2 and f"checkpoint-{best}" in folders
    assert_same(type(trained).from_pretrained(tmp_path / f"checkpoint-{best}"), made.model)


def test_a_checkpoint_of_other_heads_is_refused(tmp_path):
    run(tmp_path, max_steps=2)
    trained = model()
    made = trainer(trained, tmp_path)
    alps.use_heads(made, alps.HeadSelection([(0, 2), (1, 3)], [4, 4]))
    with pytest.raises(ValueError, match="another selection.*q_proj.weight: ranges .*8, 16.* there, .*16, 24.* here"):
        made.train(resume_from_checkpoint=True)


def test_a_trainer_scales_gradients_through_accelerate(tmp_path):
    """Accelerate's wrapper with a GradScaler: an overflow moves nothing, a finite step is the unscaled one."""
    from accelerate.optimizer import AcceleratedOptimizer

    def stepped(scale, overflow):
        trained = model()
        bound = some_heads(trained).freeze(trained)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        optimizer = AcceleratedOptimizer(alps.HeadAdamW(trained.parameters(), lr=1e-2, heads=bound), scaler=scaler)
        for k in range(3):
            batch = {key: torch.stack([row[key] for row in data()[4 * k:4 * k + 4]]) for key in ("input_ids", "labels")}
            loss = trained(**batch).loss
            (scaler.scale(loss) if scaler else loss).backward()
            if overflow == k:
                bound.params[0].param.grad.fill_(float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        return trained, optimizer.optimizer

    plain, _ = stepped(None, None)
    scaled, _ = stepped(2.0**10, None)
    assert_same(plain, scaled)
    skipped, optimizer = stepped(2.0**10, 1)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    before = model()
    assert_only_moved(skipped, before, some_heads(before).bind(skipped))


@pytest.mark.parametrize("sliced", [False, True])
def test_accelerate_prepares_model_and_optimizer(sliced):
    """Accelerate's own loop, with accumulation and autocast, is the plain loop."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # one for a process, and Trainers were here before
    GradientState._reset_state()

    def trained(prepare):
        of = model("qwen2")
        heads = some_heads(of)
        bound = alps.slice_heads(of, heads) if sliced else heads.freeze(of)
        optimizer = alps.HeadAdamW(of.parameters(), lr=1e-2, heads=bound)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16") if prepare else None
        run, stepped = accelerator.prepare(of, optimizer) if prepare else (of, optimizer)
        for k in range(6):
            batch = {key: torch.stack([row[key] for row in data()[4 * k:4 * k + 4]]) for key in ("input_ids", "labels")}
            if prepare:
                with accelerator.accumulate(run):
                    accelerator.backward(run(**batch).loss)
                    stepped.step()
                    stepped.zero_grad()
            else:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = run(**batch).loss
                (loss / 2).backward()
                if k % 2:
                    stepped.step()
                    stepped.zero_grad()
        return alps.unslice_heads(of) if sliced else of

    prepared = trained(True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    assert_same(prepared, trained(False))
    before = model("qwen2")
    assert_only_moved(prepared, before, some_heads(before).bind(prepared))


@pytest.mark.parametrize("change, error, message", [
    (lambda made: alps.use_heads(made.model, some_heads(made.model)), TypeError, "expected a transformers Trainer"),
    (lambda made: alps.use_heads(made, 0.1), TypeError, "heads is a float"),
    (lambda made: alps.use_heads(made), TypeError, "heads is a NoneType"),
    (lambda made: alps.use_heads(made, some_heads(made.model), lr=1e-3), ValueError, "lr is learning_rate of the Training"),
    (lambda made: alps.use_heads(made, some_heads(made.model), max_grad_norm=1.0), ValueError, "set it there"),
    (lambda made: alps.use_heads(made, some_heads(made.model), params=[]), TypeError, "no option 'params'"),
    (lambda made: alps.use_heads(made, some_heads(made.model), colour=1), TypeError, "no option 'colour'"),
    (lambda made: alps.use_heads(made, alps.HeadSelection([(0, 0)], [3])), ValueError, "the selection is for 3 heads"),
    (lambda made: (made.create_optimizer(), alps.use_heads(made, some_heads(made.model))), ValueError, "optimizer already"),
    (lambda made: (setattr(made.args, "fsdp", True), alps.use_heads(made, some_heads(made.model))), ValueError, "shards"),
    (lambda made: (setattr(made, "model_init", model), alps.use_heads(made, some_heads(made.model))), ValueError, "model_init"),
    (lambda made: alps.use_heads(made, alps.AlpsCallback(), rest="frozen"), ValueError, "rest is the callback's"),
])
def test_what_cannot_be_is_refused_before_anything_changes(change, error, message, tmp_path):
    made = trainer(model(), tmp_path)
    with pytest.raises(error, match=message):
        change(made)
    assert made.optimizer_cls_and_kwargs is None and all(param.requires_grad for param in made.model.parameters())


def test_a_trainer_with_an_optimizer_of_its_own_says_so(tmp_path):
    class Stubborn(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
            return self.optimizer

    made = trainer(model(), tmp_path, cls=Stubborn)
    alps.use_heads(made, some_heads(made.model))
    with pytest.raises(TypeError, match="the Trainer made AdamW"):
        made.train()


@pytest.mark.real
def test_smollm2_trains_and_resumes(tmp_path):
    """The first 4 of SmolLM2's layers in bfloat16, 4 of their 36 heads."""
    from transformers import AutoModelForCausalLM

    folder = real_models.smollm2()

    def made_of(resume=None):
        trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, num_hidden_layers=4)
        made = Trainer(trained, arguments(tmp_path, max_steps=4, save_steps=2, learning_rate=2e-5, save_total_limit=2,
                                          per_device_train_batch_size=2), train_dataset=data())
        bound = alps.use_heads(made, alps.HeadSelection([(0, 0), (1, 4), (1, 5), (3, 8)], [9] * 4))
        before = copy.deepcopy(trained)
        made.train(resume_from_checkpoint=resume)
        return made, before, bound

    whole, before, bound = made_of()
    assert_only_moved(whole.model, before, bound)
    resumed, _, _ = made_of(str(tmp_path / "checkpoint-2"))
    assert_same(resumed.model, whole.model)
    assert_same(adamw(resumed).state_dict(), adamw(whole).state_dict())
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"][0]["alps_heads"] == 4


def test_clip_is_accelerates_where_whole_parameters_train(tmp_path):
    trained = model()
    made = trainer(trained, tmp_path)
    everything = alps.use_heads(made, alps.HeadSelection.all(alps.find_heads(trained)))
    made.create_optimizer()
    grads = [torch.randn_like(part.param) for part in everything.params]
    for part, grad in zip(everything.params, grads, strict=True):
        part.param.grad = grad.clone()
    norm = ours._clip(made, None, 0.5)
    clipped = [part.param.grad for part in everything.params]
    for part, grad in zip(everything.params, grads, strict=True):
        part.param.grad = grad.clone()
    assert norm == torch.nn.utils.clip_grad_norm_([part.param for part in everything.params], 0.5)
    for part, grad in zip(everything.params, clipped, strict=True):
        assert torch.equal(part.param.grad, grad)
