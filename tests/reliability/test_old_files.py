"""Files and states that commit 30eab94 wrote still load, and hold what they held.

`tests/files_of_30eab94/make.py` wrote them. Only public names of `alps_kernels` are used here, and
`python -m alps_kernels`.
"""

import json
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

import alps_kernels as alps
from tests.files_of_30eab94.make import (
    AFTER, CASES, HEADS, HERE, PROVENANCE, differing, digests, load, pick, run, start, take_steps,
)

EXPECTED = json.loads((HERE / "expected.json").read_text())
SLICED = ("sliced", "gpt2_sliced")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `alps` with these arguments; return what it prints."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["alps", *map(str, arguments)])
        try:
            runpy.run_module("alps_kernels", run_name="__main__")
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err
        return capsys.readouterr().out
    return call


def saved_case(name):
    return torch.load(HERE / "optimizer" / f"{name}.pt", weights_only=True)


def base_of(name):
    return load(CASES[name].model, CASES[name].dtype)


# -- selections and scores -----------------------------------------------------------------------

@pytest.mark.parametrize("name, policy", [
    ("heads", {"kv": "all", "parts": ("q", "v"), "provenance": PROVENANCE}),
    ("heads_without_summary", {"kv": "none", "parts": ("q", "k", "o"), "summary": None})])
def test_a_selection_keeps_every_field(name, policy):
    model = load("llama")
    loaded, made = alps.HeadSelection.load(HERE / f"{name}.json"), pick(model, **policy)
    assert loaded == made
    assert (loaded.heads, loaded.kv, loaded.parts) == (HEADS, policy["kv"], policy["parts"])
    assert (loaded.summary, loaded.provenance) == (made.summary, policy.get("provenance"))
    assert loaded.bind(model).numel == EXPECTED["heads"][name]


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
@pytest.mark.parametrize("metric", EXPECTED["scores"])
def test_scores_keep_every_bit(metric, suffix):
    scores, expected = alps.HeadScores.load(HERE / f"scores_{metric}.{suffix}"), EXPECTED["scores"][metric]
    assert (scores.metric, scores.representation, scores.temperature) == (metric, expected["representation"], 0.5)
    assert scores.tensor.dtype == torch.float64 and [value.hex() for value in scores.tensor.tolist()] == expected["hex"]
    assert [list(head) for head in scores.ranking()] == expected["ranking"]
    assert [list(head) for head in scores.top(0.3)] == expected["top"]
    assert scores.summary == tuple(alps.find_heads(load("llama")).summary())
    assert scores.provenance["date"] == "2026-01-01T00:00:00+00:00"
    assert scores.provenance["models"]["base"]["model_type"] == "llama"


# -- patches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, provenance", [
    ("patch", PROVENANCE), ("patch_without_base", None), ("first", None), ("second", None)])
def test_a_patch_keeps_its_heads_and_fingerprints(name, provenance):
    patch, expected = alps.HeadPatch.load(HERE / f"{name}.safetensors"), EXPECTED["patches"][name]
    assert {key: getattr(patch, key) for key in expected} == expected
    assert (patch.base_fingerprint is None) == (name == "patch_without_base")
    assert patch.provenance == provenance
    if name != "second":
        assert patch.selection == pick(load("llama"))


@pytest.mark.parametrize("name, model, dtype", [("patch", "llama", torch.float32), ("patch_without_base", "gpt2", torch.bfloat16)])
def test_a_patch_applies_and_reverts_exactly(name, model, dtype):
    model, base = load(model, dtype), load(model, dtype)
    tuned = {key.removeprefix(f"{name}/"): value for key, value in load_file(HERE / "tuned.safetensors").items()
             if key.startswith(f"{name}/")}
    assert tuned
    alps.apply_patch(model, HERE / f"{name}.safetensors")
    assert alps.applied_patches(model) == (name,)
    assert digests(model.state_dict()) == digests({**base.state_dict(), **tuned})
    alps.revert_patch(model)
    assert digests(model.state_dict()) == digests(base.state_dict())


def test_a_patched_checkpoint_reverts_to_the_bytes_of_the_base(command, tmp_path):
    command("patch", "revert", HERE / "patched", "-o", tmp_path / "once")
    command("patch", "revert", tmp_path / "once", "-o", tmp_path / "base")
    command("patch", "apply", HERE / "llama", HERE / "first.safetensors", "-o", tmp_path / "once_again")
    command("patch", "apply", tmp_path / "once_again", HERE / "second.safetensors", "-o", tmp_path / "twice_again")
    weights = {folder: (folder / "model.safetensors").read_bytes()
               for folder in (HERE / "llama", HERE / "patched", *tmp_path.iterdir())}
    assert weights[tmp_path / "base"] == weights[HERE / "llama"]
    assert weights[tmp_path / "once"] == weights[tmp_path / "once_again"]
    assert weights[tmp_path / "twice_again"] == weights[HERE / "patched"]
    assert len(set(weights.values())) == 3
    assert not (tmp_path / "base" / "alps_patch").exists()


def test_a_sparse_update_is_written_the_same_and_can_be_put_in(command, tmp_path):
    index = alps.export_sparse(HERE / "first.safetensors", HERE / "llama", tmp_path / "sparse")
    assert index == json.loads((HERE / "sparse" / "sparse_update.index.json").read_text())
    old, new = (load_file(folder / "sparse" / "sparse_update.safetensors") for folder in (HERE, tmp_path))
    assert digests(old) == digests(new) and set(old) == set(index["tensors"])
    update = HERE / "sparse" / "sparse_update.safetensors"
    command("patch", "revert", HERE / "llama", "--originals", update, "-o", tmp_path / "updated")
    command("patch", "apply", HERE / "llama", HERE / "first.safetensors", "-o", tmp_path / "patched")
    updated, patched = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("updated", "patched"))
    assert updated == patched


# -- states of the optimizer ---------------------------------------------------------------------

# torch.distributed.checkpoint keeps "state" and "param_groups" alone. Without "alps", commit 30eab94
# refuses the state of "set_heads", where elements of a whole parameter differ in age.
KEPT_BY_DCP = ("state", "param_groups")


@pytest.mark.parametrize("name, entries", [
    *[pytest.param(name, (*KEPT_BY_DCP, "alps"), id=name) for name in CASES],
    *[pytest.param(name, KEPT_BY_DCP, id=f"{name} of DCP") for name in CASES if name not in ("dense", "set_heads")]])
@pytest.mark.filterwarnings("ignore:.*has 16 bits and no master")
def test_two_more_steps_give_the_bytes_that_the_old_code_got(name, entries):
    saved, (model, optimizer) = saved_case(name), start(CASES[name])
    model.load_state_dict({**model.state_dict(), **saved["model"]})
    saved["optimizer"] = {key: value for key, value in saved["optimizer"].items() if key in entries}
    optimizer.load_state_dict(saved["optimizer"])
    if not CASES[name].dense:
        assert digests(optimizer.state_dict()["state"]) == digests(saved["optimizer"]["state"])
    take_steps(model, optimizer, AFTER)
    found = {"model": differing(model, base_of(name)), "state": optimizer.state_dict()["state"]}
    assert digests(found) == EXPECTED["optimizers"][name]


# -- weights of sliced models --------------------------------------------------------------------

def sliced_weights(name):
    """As a user loads them: from the folder of save_pretrained, or from a pickled state dict."""
    if CASES[name].model == "llama":
        return load_file(HERE / "sliced" / "model.safetensors")
    return torch.load(HERE / "sliced.pt", weights_only=True)


@pytest.mark.parametrize("name", SLICED)
def test_weights_of_a_sliced_model_load_into_a_plain_one(name):
    model, base = base_of(name), base_of(name)
    missing, unexpected = model.load_state_dict(sliced_weights(name), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied: safetensors holds it once
    assert digests(differing(model, base)) == digests(saved_case(name)["model"])


def test_the_folder_of_a_sliced_model_loads_with_from_pretrained():
    assert digests(differing(load("sliced"), load("llama"))) == digests(saved_case("sliced")["model"])


@pytest.mark.parametrize("name", SLICED)
def test_weights_of_a_sliced_model_load_into_a_sliced_one(name):
    model, _ = start(CASES[name])
    leaves = [key for key, _ in model.named_parameters() if key.endswith("_slice")]
    missing, unexpected = model.load_state_dict(sliced_weights(name), strict=False)
    assert leaves and not unexpected and set(missing) <= {"lm_head.weight"}
    expected = digests(saved_case(name)["model"])
    assert digests(differing(model, base_of(name))) == expected
    assert digests(differing(alps.unslice_heads(model), base_of(name))) == expected


# -- runs of the Trainer -------------------------------------------------------------------------

@pytest.mark.parametrize("step", [2, 4], ids=["before the heads are chosen", "after"])
def test_a_run_resumes_to_the_same_bytes(step, tmp_path):
    shutil.copytree(HERE / "run", tmp_path, dirs_exist_ok=True)
    for name in ("alps_heads.json", "alps_scores.json"):
        (tmp_path / name).unlink()
    trainer, callback = run(tmp_path, resume=step)
    expected = EXPECTED["run"]
    assert [list(head) for head in callback.heads] == expected["heads"]
    assert digests({"model": trainer.model.state_dict(), "state": trainer.optimizer.state_dict()["state"]}) == expected["final"]
    assert (tmp_path / "alps_heads.json").exists() == (step == 2)


def test_what_a_run_wrote_at_the_choice_loads():
    heads = alps.HeadSelection.load(HERE / "run" / "alps_heads.json")
    scores = alps.HeadScores.load(HERE / "run" / "alps_scores.json")
    assert [list(head) for head in heads] == EXPECTED["run"]["heads"]
    assert [list(head) for head in scores.ranking()] == EXPECTED["run"]["ranking"]
    assert scores.top(0.25) == heads
