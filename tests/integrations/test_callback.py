"""The one run: warm up on every head, score them against the start, keep the top ones, go on."""

import copy
import json
import warnings

import pytest
import torch
from transformers import TrainerCallback

import alps_kernels as alps
from alps_kernels.integrations import callback as one_run, resume as resuming

from .cases import adamw, assert_only_moved, assert_same, data, model, some_heads, trainer

pytestmark = [pytest.mark.filterwarnings("error::DeprecationWarning"), pytest.mark.filterwarnings("error::FutureWarning")]
WARM = 3


class Spy(TrainerCallback):
    """What the model and the optimizer are before and after the switch; to stand around the callback."""

    def __init__(self, at=WARM):
        self.at, self.models, self.states = at, [], []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == self.at:
            inner = resuming.unwrap_optimizer(optimizer)
            self.models.append(copy.deepcopy(model))
            names = {param: name for name, param in model.named_parameters()}
            self.states.append({names[param]: {key: value.clone() for key, value in entry.items()}
                                for param, entry in inner.state.items()})


def run(folder, kind="llama", dtype=torch.float32, resume=None, start=None, spies=(), options=None, **changes):
    of = model(kind, dtype) if start is None else start
    callback = alps.AlpsCallback(**{"ratio": 0.25, "warmup_steps": WARM, **(options or {})})
    made = trainer(of, folder, callbacks=[spies[0]] if spies else None, **changes)
    alps.use_heads(made, callback)
    if spies:
        made.add_callback(spies[1])
    made.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return made, callback


@pytest.mark.filterwarnings("ignore:You are adding a <class")
@pytest.mark.parametrize("restore", one_run.RESTORE)
@pytest.mark.parametrize("kind, options", [
    ("llama", {}), ("qwen2", {"parts": ("q", "k", "v", "o"), "representation": "qkvo"}), ("phi3", {"kv": "all"}),
    ("gpt2", {"representation": "qkv", "metric": "relative"}), ("neox", {"parts": ("q",)}), ("bert", {}),
    ("llama", {"rest": "trainable"}), ("llama", {"ratio": 0.125})])
def test_the_switch(kind, options, restore, tmp_path):
    spies = Spy(), Spy()
    made, callback = run(tmp_path, kind, options={"restore": restore, **options}, spies=spies, save_strategy="no")
    before, heads = model(kind), callback.heads
    (warmed,), (switched,) = spies[0].models, spies[1].models
    rest = options.get("rest", "frozen")
    everything = alps.HeadSelection.all(alps.find_heads(before), kv=heads.kv, parts=heads.parts)
    assert_only_moved(warmed, before, everything.bind(warmed, rest=rest))

    scores = alps.score_heads(before, warmed, metric=options.get("metric", "pad"),
                              representation=options.get("representation", "projection"))
    assert torch.equal(scores.tensor, callback.scores.tensor)
    assert heads == scores.top(options.get("ratio", 0.25), kv=heads.kv, parts=heads.parts)
    assert len(heads) == options.get("ratio", 0.25) * len(scores)

    kept = {part.name: part for part in heads.bind(switched, rest=rest).params}
    old = {"base": before, "keep": warmed}[restore]
    for name, param in switched.named_parameters():
        inside = torch.zeros_like(param, dtype=torch.bool)
        for block in kept[name].blocks(inside) if name in kept else []:
            block.fill_(True)
        then, warm = dict(old.named_parameters())[name], dict(warmed.named_parameters())[name]
        assert torch.equal(param[inside], warm[inside]) and torch.equal(param[~inside], then[~inside]), name
        assert param.requires_grad == (name in kept)

    (full,), (cut,) = spies[0].states, spies[1].states
    assert set(cut) == set(kept) < set(full) or set(cut) == set(kept)
    for name, part in kept.items():
        assert cut[name]["exp_avg_sq"].numel() == part.numel
        dense = part if full[name]["exp_avg"].shape == part.param.shape else None
        if dense is not None:
            assert torch.equal(part.cut(full[name]["exp_avg"]), cut[name]["exp_avg"].reshape(-1))
        assert cut[name]["step"].eq(WARM).all()

    bound = heads.bind(made.model, rest=rest)
    assert_only_moved(made.model, switched, bound)
    if restore == "base":
        assert_only_moved(made.model, before, bound)
    assert alps.HeadSelection.load(tmp_path / one_run.HEADS_FILE) == heads
    assert torch.equal(alps.HeadScores.load(tmp_path / one_run.SCORES_FILE).tensor, scores.tensor)


@pytest.mark.fault("Resume", "one-run training resumed before, at and after the switch to heads: the same bytes")
@pytest.mark.parametrize("case", [
    {}, {"options": {"restore": "keep"}, "dtype": torch.bfloat16}, {"kind": "phi3", "options": {"parts": ("q", "v")}},
    {"kind": "gpt2", "bf16": True, "gradient_accumulation_steps": 2, "checkpointing": True},
    {"restore_callback_states_from_checkpoint": True}, {"options": {"rest": "trainable"}}])
def test_resume_before_at_and_after_the_switch_is_bit_equal(case, tmp_path):
    whole, callback = run(tmp_path, **case)
    for step in (WARM - 1, WARM, WARM + 2):
        resumed, again = run(tmp_path, resume=step, save_strategy="no", **case)
        assert_same(resumed.model, whole.model)
        assert_same(adamw(resumed).state_dict(), adamw(whole).state_dict())
        assert [p.requires_grad for p in resumed.model.parameters()] == [p.requires_grad for p in whole.model.parameters()]
        again = next(c for c in resumed.callback_handler.callbacks if isinstance(c, alps.AlpsCallback))
        assert again.heads == callback.heads and again.start_bytes == 0


def test_a_run_resumes_from_the_model_of_its_checkpoint_too(tmp_path):
    """The start is read from its file, not taken from the model that the Trainer is given."""
    whole, _ = run(tmp_path)
    saved = type(whole.model).from_pretrained(tmp_path / "checkpoint-2")
    resumed, _ = run(tmp_path, resume=2, start=saved, save_strategy="no")
    assert_same(resumed.model, whole.model)


def test_the_start_is_held_until_the_switch_and_its_size_is_told(tmp_path):
    made, callback = run(tmp_path, "qwen2", save_strategy="no")
    told = [row for row in made.state.log_history if "alps_trained" in row]
    attention = sum(param.numel() for name, param in made.model.named_parameters()
                    if any(f"{part}_proj" in name for part in "qkv"))
    assert [row["step"] for row in told] == [0, WARM] and told[0]["alps_start_bytes"] == 4 * attention
    assert told[0]["alps_trained"] == attention and told[1]["alps_trained"] == callback.heads.bind(made.model).numel
    assert callback.start_bytes == 0 and not (tmp_path / one_run.START_FILE).exists()


def test_weights_of_16_bits_are_scored_with_their_masters(tmp_path):
    """At a learning rate at which most bfloat16 weights do not move, the scores are those of the float32 masters."""
    spies = Spy(), Spy()
    _, callback = run(tmp_path, dtype=torch.bfloat16, spies=spies, save_strategy="no", learning_rate=1e-5, warmup_steps=0)
    before, warmed, state = model(dtype=torch.bfloat16), spies[0].models[0], spies[0].states[0]
    before, exact = before.float(), copy.deepcopy(warmed).float()
    stuck = 0
    for name, param in exact.named_parameters():
        if name in state:
            bits = dict(warmed.named_parameters())[name].detach().view(torch.int16).int() << 16
            param.data = (bits + state[name]["master_lo"].int()).view(torch.float32)
            stuck += int((dict(warmed.named_parameters())[name].float() == dict(before.named_parameters())[name]).sum())
    assert stuck > 1000
    assert torch.equal(alps.score_heads(before, exact).tensor, callback.scores.tensor)
    assert not torch.equal(alps.score_heads(before, warmed).tensor, callback.scores.tensor)


def test_any_head_adamw_will_do_for_a_run_that_does_not_stop(tmp_path):
    """`callbacks=` and `optimizer_cls_and_kwargs=` alone."""
    made = trainer(model(), tmp_path, callbacks=[alps.AlpsCallback(0.25, WARM)], optimizer=(alps.HeadAdamW, {"lr": 1e-2}),
                   max_grad_norm=0.0, save_strategy="no")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.train()
    assert_same(made.model, run(tmp_path, save_strategy="no", max_grad_norm=0.0)[0].model)
    saving = trainer(model(), tmp_path, callbacks=[alps.AlpsCallback(0.25, WARM)], optimizer=(alps.HeadAdamW, {"lr": 1e-2}))
    with pytest.warns(UserWarning, match="only resume with the optimizer that alps.use_heads"):
        saving.train()


def test_a_best_model_of_the_warm_up_is_told(tmp_path):
    changes = {"eval_dataset": data()[:8], "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
               "metric_for_best_model": "eval_loss", "learning_rate": 1.0, "warmup_steps": 0}
    with pytest.warns(UserWarning, match="that of step [12] of the warm-up"):
        run(tmp_path, **changes)


def test_train_again_begins_again(tmp_path):
    made, callback = run(tmp_path, save_strategy="no")
    first = copy.deepcopy(made.model)
    made.train()
    assert_only_moved(made.model, first, callback.heads.bind(made.model))


@pytest.mark.parametrize("options, message", [
    ({"ratio": 0}, "no head would train"), ({"ratio": 2}, "ratio is 2"), ({"warmup_steps": 0}, "warmup_steps is 0"),
    ({"warmup_steps": 1.5}, "warmup_steps is 1.5"), ({"restore": "all"}, "restore is 'all'"), ({"metric": "l7"}, "metric is 'l7'"),
    ({"representation": "w"}, "representation is 'w'"), ({"kv": "some"}, "kv is 'some'"), ({"parts": ()}, r"parts is \(\)"),
    ({"rest": "half"}, "rest is 'half'"), ({"parts": ("o",)}, "'projection' sees nothing"),
    ({"parts": ("q",), "representation": "k"}, "'k' sees nothing")])
def test_options_that_do_not_exist_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        alps.AlpsCallback(**options)


def pair(**options):
    return {"callbacks": [alps.AlpsCallback(0.25, WARM, **options)], "optimizer": (alps.HeadAdamW, {"lr": 1e-2})}


@pytest.mark.parametrize("make, error, message", [
    (lambda f: trainer(model(), f, **{**pair(), "optimizer": None}), TypeError, "needs HeadAdamW as optimizer and found AdamW"),
    (lambda f: trainer(model(), f, max_steps=WARM, **pair()), ValueError, "warm-up of 3 steps does not end"),
    (lambda f: trainer(model(), f, **pair(temperature=-1.0)), ValueError, "temperature is -1.0"),
    (lambda f: trainer(model(), f, **pair(attention="cross")), ValueError, "no attention called 'cross'"),
    (lambda f: trainer(model(), f, **{**pair(), "optimizer": (alps.HeadAdamW, {"lr": 0.0})}), ValueError,
     "no head moved in 3 warm-up steps .*learning rate is now 0"),
])
def test_runs_that_cannot_be_are_refused(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make(tmp_path).train()


def test_nan_weights_are_found_before_the_warm_up(tmp_path):
    of = model()
    of.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.0.self_attn.k_proj.weight of the base model .start. holds 1 NaN"):
        run(tmp_path, start=of)


def test_a_sliced_model_is_refused(tmp_path):
    alps_slice = getattr(alps, "slice_heads", None)
    if alps_slice is None:
        pytest.skip("slice_heads is not there yet")
    of = model()
    alps.slice_heads(of, some_heads(of))
    with pytest.raises(ValueError, match="give it the model unsliced"):
        alps.use_heads(trainer(of, tmp_path), alps.AlpsCallback())


def spoil(path, change):
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def test_what_a_resume_needs_is_missed_by_name(tmp_path):
    run(tmp_path)
    start = tmp_path / one_run.START_FILE
    kept = start.read_bytes()
    start.unlink()
    with pytest.raises(ValueError, match="alps_start.safetensors with the weights it began from cannot be read"):
        run(tmp_path, resume=2)
    start.write_bytes(kept[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        run(tmp_path, resume=2)
    start.write_bytes(kept[:-8] + b"12345678")
    with pytest.raises(ValueError, match="it is of another run"):
        run(tmp_path, resume=2)
    start.write_bytes(kept)
    with pytest.raises(ValueError, match="begun with ratio 0.25, AlpsCallback now has 0.5"):
        run(tmp_path, resume=4, options={"ratio": 0.5})
    spoil(tmp_path / "checkpoint-2" / "trainer_state.json", lambda state: state["stateful_callbacks"].pop("AlpsCallback"))
    with pytest.raises(ValueError, match="step 2 of this run was saved without AlpsCallback"):
        run(tmp_path, resume=2)
    spoil(tmp_path / "checkpoint-4" / "trainer_state.json", lambda state: state["stateful_callbacks"]["AlpsCallback"][
        "attributes"]["saved"]["heads"].pop("kv"))
    with pytest.raises(ValueError, match="not a valid head selection: 'kv' is missing"):
        run(tmp_path, resume=4)


def following(of):
    optimizer = resuming.FollowingHeadAdamW(of.parameters(), lr=1e-2)
    batch = {key: torch.stack([row[key] for row in data()[:4]]) for key in ("input_ids", "labels")}
    of(**batch).loss.backward()
    return optimizer


def test_the_optimizer_follows_a_narrower_state_before_its_first_step_alone():
    of = model()
    optimizer = following(of)
    heads = some_heads(of).bind(of)
    optimizer.set_heads(heads)
    optimizer.step()
    saved = optimizer.state_dict()
    fresh = following(model())
    fresh.load_state_dict(saved)
    assert_same(fresh.state_dict(), saved)
    stepped = following(model())
    stepped.step()
    kept = stepped.state_dict()
    with pytest.raises(ValueError, match="another selection"):
        stepped.load_state_dict(saved)
    assert_same(stepped.state_dict(), kept)
    narrow = model()
    narrower = following(narrow)
    narrower.set_heads(alps.HeadSelection([(0, 1)], [4, 4]).bind(narrow))
    before = narrower.state_dict()
    with pytest.raises(ValueError, match="another selection"):
        narrower.load_state_dict(saved)
    assert_same(narrower.state_dict(), before)
