"""Head patches on checkpoint folders, and the command line `alps patch`."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel
from typer.testing import CliRunner

import alps_kernels as alps
from alps_kernels import HeadPatch, apply_patch, save_patch
from alps_kernels.cli import main
from alps_kernels.cli.commands import app
from alps_kernels.patching import (
    apply_to_checkpoint, checkpoint as patch_checkpoint, patch_from_checkpoints, revert_checkpoint,
)
from alps_kernels.tensors import files
from alps_kernels.weights import Checkpoint
from tests.support import real_models

from ..weights.test_checkpoints import to_bin
from .cases import MODELS, build, pick, raw, same_bytes, snapshot, tune


def files_of(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def folders(tmp_path):
    """A Llama in bfloat16 as shards, tuned on some heads, with a file that is no model's."""
    base = build(dtype=torch.bfloat16)
    heads = pick(base)
    tuned = tune(base, heads)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    tuned.save_pretrained(tmp_path / "tuned")
    (tmp_path / "base" / "tokenizer").mkdir()
    (tmp_path / "base" / "tokenizer" / "words.txt").write_text("a b c")
    heads.save(tmp_path / "heads.json")
    return base, tuned, heads, tmp_path


@pytest.mark.filterwarnings("ignore:.*transformers converts some weights")
@pytest.mark.parametrize("name", MODELS)
def test_folders_and_memory_make_the_same_patch(name, tmp_path):
    base = build(name, torch.float16)
    heads = pick(base)
    tuned = tune(base, heads)
    for model, folder in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / folder)
    made = patch_from_checkpoints(tmp_path / "base", tmp_path / "tuned", heads, name="p")
    saved = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    assert made.cuts == saved.cuts and made.outside == saved.outside and made.base == saved.base
    assert all(torch.equal(made.values[key].view(torch.int16), value.view(torch.int16)) for key, value in saved.values.items())
    assert save_patch(tuned, tmp_path / "q.safetensors", base=tmp_path / "base").base_fingerprint == made.base_fingerprint

    apply_to_checkpoint(tmp_path / "base", [made], tmp_path / "out")
    held, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "tuned"))
    assert held.keys() == wanted.keys() and all(torch.equal(raw(held[key]), raw(value)) for key, value in wanted.items())
    before = files_of(tmp_path / "base")
    after = files_of(tmp_path / "out")
    assert {key for key in after if after[key] != before.get(key)} == {"model.safetensors", "alps_patch/originals.001.safetensors"}
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == before
    apply_patch(base, tmp_path / "p.safetensors")


@pytest.mark.parametrize("options", [None, {}, {"legacy": True}, {"shards": 3}], ids=str)
def test_shards_and_pickles(folders, options):
    base, tuned, heads, root = folders
    if options is not None:
        to_bin(root / "base", **options)
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    apply_to_checkpoint(root / "base", [made], root / "out")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto"), snapshot(tuned))
    assert (root / "out" / "tokenizer" / "words.txt").read_text() == "a b c"
    revert_checkpoint(root / "out", root / "back")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "back", dtype="auto"), snapshot(base))
    if options is None:
        assert files_of(root / "back") == files_of(root / "base")
        untouched = [file for file, data in files_of(root / "base").items() if files_of(root / "out")[file] == data]
        assert len(untouched) > 4


@pytest.mark.real
def test_smollm2_from_folder_to_folder(tmp_path):
    folder = real_models.smollm2()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    heads = alps.HeadSelection.random(alps.find_heads(base), 0.1)
    tuned = tune(base, heads, scale=1e-3)
    tuned.save_pretrained(tmp_path / "tuned")
    made = patch_from_checkpoints(folder, tmp_path / "tuned", heads)
    shutil.rmtree(tmp_path / "tuned")
    apply_to_checkpoint(folder, [made], tmp_path / "out")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), snapshot(tuned))
    revert_checkpoint(tmp_path / "out", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)


def test_a_prefix_of_the_stored_names(tmp_path):
    """Names of the checkpoint are not the model's: the patch speaks of the model's."""
    torch.manual_seed(0)
    base = BertModel(build("bert").config)
    heads = pick(base)
    tuned = tune(base, heads)
    for model, name in ((base, "base"), (tuned, "tuned")):
        model.save_pretrained(tmp_path / name)
        to_bin(tmp_path / name, prefix="bert.")
    made = patch_from_checkpoints(tmp_path / "base", tmp_path / "tuned", heads)
    assert all(not name.startswith("bert.") for name in made.cuts)
    apply_to_checkpoint(tmp_path / "base", [made], tmp_path / "out")
    held = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(held["bert." + name], value) for name, value in tuned.state_dict().items())


def test_several_patches_one_after_another_and_back(folders):
    base, _, _, root = folders
    tuned = {name: tune(base, pick(base, heads), seed=7) for name, heads in (("a", ((0, 0), (0, 1))), ("b", ((0, 2), (1, 3))))}
    made = [save_patch(model, root / f"{name}.safetensors", base=base) for name, model in tuned.items()]
    apply_to_checkpoint(root / "base", made, root / "both")
    apply_patch(base, [root / "a.safetensors", root / "b.safetensors"])
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "both", dtype="auto"), snapshot(base))
    revert_checkpoint(root / "both", root / "back")
    assert files_of(root / "back") == files_of(root / "base")

    apply_to_checkpoint(root / "base", [made[0]], root / "first")
    with pytest.raises(ValueError, match="patch 'b' does not fit first: .* is not the base's"):
        apply_to_checkpoint(root / "first", [made[1]], root / "second")
    apply_to_checkpoint(root / "first", [made[1]], root / "second", verify=False)
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "second", dtype="auto"), snapshot(base))
    revert_checkpoint(root / "second", root / "back1")
    assert files_of(root / "back1") == files_of(root / "first")
    revert_checkpoint(root / "back1", root / "back2")
    assert files_of(root / "back2") == files_of(root / "base")


@pytest.mark.fault("Bad input")
def test_refused_with_nothing_written(folders):
    """patches of other checkpoints, targets that are there or lie inside the source: refused, nothing written"""
    base, tuned, heads, root = folders
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    there = sorted(os.listdir(root))
    for action, error, message in [
        (lambda: apply_to_checkpoint(root / "base", [made, made], root / "out"), ValueError, "overlaps"),
        (lambda: apply_to_checkpoint(root / "tuned", [made], root / "out"), ValueError, "where the patch would go"),
        (lambda: apply_to_checkpoint(root / "base", [made], root / "base"), FileExistsError, "already there"),
        (lambda: apply_to_checkpoint(root / "base", [made], root / "base" / "out"), ValueError, "lies inside"),
        (lambda: apply_to_checkpoint(root / "base", [made], root / "none" / "out"), FileNotFoundError, "none"),
        (lambda: apply_to_checkpoint(root / "base" / "model.safetensors.index.json", [made], root / "out"), ValueError, "folder"),
        (lambda: revert_checkpoint(root / "base", root / "out"), FileNotFoundError, "holds no originals"),
        (lambda: patch_from_checkpoints(root / "base", root / "tuned", pick(base, ((0, 1),))), ValueError, "differs from base outside"),
    ]:
        with pytest.raises(error, match=message):
            action()
        assert sorted(os.listdir(root)) == there


def test_a_patched_folder_that_was_trained_on_is_not_reverted(folders):
    _, _, heads, root = folders
    apply_to_checkpoint(root / "base", [patch_from_checkpoints(root / "base", root / "tuned", heads)], root / "out")
    shard = next(f for f in sorted((root / "out").glob("*.safetensors")) if any("q_proj" in k for k in load_file(f)))
    held = load_file(shard)
    key = next(k for k in held if "q_proj" in k)
    held[key] += 1
    save_file(held, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=f"the slices of {key} in .*out are not those"):
        revert_checkpoint(root / "out", root / "back")
    assert not (root / "back").exists()


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("stage", ["copytree", "_patch_file", "sync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_appears_whole_or_not_at_all(folders, stage, error, monkeypatch):
    """errors and interrupts while a patched checkpoint is written: no folder, no stray, the base untouched"""
    _, _, heads, root = folders
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    there, base = sorted(os.listdir(root)), files_of(root / "base")
    where = {"copytree": shutil, "_patch_file": patch_checkpoint, "sync": files, "replace": os}[stage]

    def failing(*_, **__):
        raise error("planted")

    monkeypatch.setattr(where, stage, failing)
    with pytest.raises(error, match="planted"):
        apply_to_checkpoint(root / "base", [made], root / "out")
    monkeypatch.undo()
    assert sorted(os.listdir(root)) == there and files_of(root / "base") == base


def test_links_and_read_only_files_of_a_cache(folders):
    _, tuned, heads, root = folders
    (root / "cache").mkdir()
    for file in [f for f in (root / "base").iterdir() if f.is_file()]:
        file.chmod(0o444)
        (root / "cache" / file.name).symlink_to(file)
    made = patch_from_checkpoints(root / "cache", root / "tuned", heads)
    before = files_of(root / "base")
    apply_to_checkpoint(root / "cache", [made], root / "out")
    assert files_of(root / "base") == before
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto"), snapshot(tuned))
    assert not any(file.is_symlink() for file in (root / "out").iterdir())


def test_one_tensor_of_each_checkpoint_at_a_time(folders, monkeypatch):
    _, _, heads, root = folders
    read, sizes = Checkpoint.read, []

    def counting(self, names):
        sizes.append(len(names))
        return read(self, names)

    monkeypatch.setattr(Checkpoint, "read", counting)
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    assert sizes == 2 * len(made.outside) * [1]


# -- the command line ------------------------------------------------------------------------


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["patch", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_whole_way_on_the_command_line(folders):
    base, tuned, heads, root = folders
    said = invoke("make", root / "base", root / "tuned", "--heads", root / "heads.json", "-o", root / "p.safetensors")
    assert "3 of 8 heads of a LlamaForCausalLM" in said.output
    info = json.loads(invoke("info", root / "p.safetensors", "--check", root / "base", "--json").stdout)
    loaded = HeadPatch.load(root / "p.safetensors")
    assert info["heads"] == [[0, 1], [1, 0], [1, 3]] and info["bytes"] == loaded.nbytes and info["not_finite"] == 0
    assert info["file_bytes"] == (root / "p.safetensors").stat().st_size and info["base_fingerprint"] == loaded.base_fingerprint
    assert info["provenance"] == {"base": "base", "tuned": "tuned", "heads": "heads.json"}
    assert "fits" in invoke("info", root / "p.safetensors", "--check", root / "base").output
    invoke("apply", root / "base", root / "p.safetensors", "-o", root / "out")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto"), snapshot(tuned))
    assert json.loads(invoke("revert", root / "out", "-o", root / "back", "--json").stdout) == {"out": str(root / "back")}
    assert files_of(root / "back") == files_of(root / "base")
    invoke("apply", root / "base", root / "p.safetensors", "-o", root / "bare", "--no-originals")
    assert not (root / "bare" / "alps_patch").exists()
    invoke("export", root / "p.safetensors", "--merged", "--base", root / "base", "-o", root / "merged")
    assert files_of(root / "merged") == files_of(root / "bare")


def test_changes_outside_are_left_out_only_when_told(folders):
    base, tuned, heads, root = folders
    with torch.no_grad():
        tuned.model.norm.weight += 1
    tuned.save_pretrained(root / "tuned")
    make = ("make", root / "base", root / "tuned", "--heads", root / "heads.json", "-o", root / "p.safetensors")
    with pytest.raises(ValueError, match="tuned differs from base outside the selected slices: model.norm.weight"):
        CliRunner().invoke(app, ["patch", *map(str, make)], catch_exceptions=False)
    assert not (root / "p.safetensors").exists()
    assert json.loads(invoke(*make, "--allow-outside-changes", "--json").stdout)["left_out"] == ["model.norm.weight"]
    invoke("apply", root / "base", root / "p.safetensors", "-o", root / "out")
    held = AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto")
    with torch.no_grad():
        tuned.model.norm.weight -= 1
    assert same_bytes(held, snapshot(tuned))


def test_diff(folders):
    base, tuned, heads, root = folders
    save_patch(tuned, root / "a.safetensors", base=base)
    other = tune(base, pick(base, ((0, 1), (0, 3), (1, 0))), seed=5)
    save_patch(other, root / "b.safetensors")
    same = json.loads(invoke("diff", root / "a.safetensors", root / "a.safetensors", "--json").stdout)
    assert same["equal"] and same["same_base"] and not same["only_first"] and not any(s["differing"] for s in same["shared"])
    found = json.loads(invoke("diff", root / "a.safetensors", root / "b.safetensors", "--json").stdout)
    assert found["both"] == [[0, 1], [1, 0]] and found["only_first"] == [[1, 3]] and found["only_second"] == [[0, 3]]
    assert found["same_base"] and not found["equal"]
    ours, theirs = tuned.state_dict(), other.state_dict()
    for part in found["shared"]:
        blocks = [torch.cat([m[part["tensor"]].narrow(part["dim"], a, b - a) for a, b in part["ranges"]], part["dim"]) for m in (ours, theirs)]
        assert part["numel"] == blocks[0].numel()
        assert part["differing"] == int((blocks[0].view(torch.int16) != blocks[1].view(torch.int16)).sum())
        assert part["largest"] == (blocks[0].double() - blocks[1].double()).abs().max().item()
    assert "values are in both" in invoke("diff", root / "a.safetensors", root / "b.safetensors").output
    save_patch(tune(base, pick(base, ((1, 2),))), root / "c.safetensors")
    save_patch(tune(base, pick(base, ((0, 0),))), root / "d.safetensors")
    assert "they share no slice" in invoke("diff", root / "c.safetensors", root / "d.safetensors").output
    torch.manual_seed(3)
    stranger = MODELS["llama"]().bfloat16()
    save_patch(tune(stranger, heads), root / "e.safetensors")
    assert not json.loads(invoke("diff", root / "a.safetensors", root / "e.safetensors", "--json").stdout)["same_base"]


@pytest.mark.fault("Bad input")
@pytest.mark.parametrize("arguments, message", [
    (["make", "nowhere", "{tuned}", "--heads", "{heads}", "-o", "{root}/x.safetensors"], "nowhere does not exist"),
    (["make", "{base}", "{tuned}", "--heads", "nowhere.json", "-o", "{root}/x.safetensors"], "nowhere.json"),
    (["make", "{base}", "{tuned}", "--heads", "{base}/config.json", "-o", "{root}/x.safetensors"], "not a alps_kernels.heads"),
    (["make", "{base}", "{tuned}", "--heads", "{heads}", "-o", "/nowhere/x.safetensors"], "/nowhere"),
    (["make", "{base}", "{tuned}"], "Missing option"),
    (["apply", "{base}", "{heads}", "-o", "{root}/x"], "is not a valid alps_kernels.patch file"),
    (["apply", "{tuned}", "{patch}", "-o", "{root}/x"], "where the patch would go"),
    (["apply", "{base}", "{patch}", "-o", "{tuned}"], "already there"),
    (["apply", "{base}", "{patch}", "{patch}", "-o", "{root}/x"], "overlaps"),
    (["revert", "{base}", "-o", "{root}/x"], "holds no originals"),
    (["revert", "{base}", "-o", "{root}/x", "--originals", "{patch}"], "alps_kernels.sparse"),
    (["info", "{base}"], "is not a file"), (["info", "nowhere"], "nowhere"),
    (["info", "{patch}", "--check", "{tuned}"], "where the patch would go"),
    (["diff", "{patch}", "{heads}"], "heads.json is not a valid"),
    (["export", "{patch}", "--base", "{base}", "-o", "{root}/x"], "give one of"),
    (["export", "{patch}", "--lora", "--merged", "--base", "{base}", "-o", "{root}/x"], "give one of"),
    (["export", "{patch}", "--merged", "--rank", "3", "--base", "{base}", "-o", "{root}/x"], "--rank goes with"),
    (["export", "{patch}", "--lora", "--rank", "0", "--base", "{base}", "-o", "{root}/x"], "rank is 0"),
    (["export", "{patch}", "--lora", "--base", "{tuned}", "-o", "{root}/x"], "where the patch would go"),
    (["mkae"], "mkae")])
def test_a_mistake_costs_a_line_not_a_traceback(folders, arguments, message, monkeypatch, capsys):
    """mistakes on the command line of alps patch: one line, exit code 2, no file written"""
    base, tuned, heads, root = folders
    patch_from_checkpoints(root / "base", root / "tuned", heads).save(root / "p.safetensors")
    there = sorted(os.listdir(root))
    names = {"base": root / "base", "tuned": root / "tuned", "heads": root / "heads.json", "patch": root / "p.safetensors", "root": root}
    monkeypatch.setattr(sys, "argv", ["alps", "patch", *(a.format(**names) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in " ".join(said.split()) and "Traceback" not in said
    assert sorted(os.listdir(root)) == there


def test_a_config_beside_the_checkpoint(folders):
    base, tuned, heads, root = folders
    for name in ("base", "tuned"):
        (root / name / "config.json").rename(root / f"{name}.json")
    with pytest.raises(ValueError, match="has no config.json"):
        patch_from_checkpoints(root / "base", root / "tuned", heads)
    more = ("--config", root / "base.json")
    invoke("make", root / "base", root / "tuned", "--heads", root / "heads.json", "-o", root / "p.safetensors", *more)
    invoke("info", root / "p.safetensors", "--check", root / "base", *more)
    invoke("apply", root / "base", root / "p.safetensors", "-o", root / "out", *more)
    for form in ("lora", "merged", "sparse"):
        invoke("export", root / "p.safetensors", f"--{form}", "--base", root / "base", "-o", root / form, *more)
    shutil.copy(root / "base.json", root / "out" / "config.json")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(root / "out", dtype="auto"), snapshot(tuned))


def test_other_weights_in_the_folder_are_told(folders):
    _, _, heads, root = folders
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    (root / "base" / "optimizer.pt").touch()
    (root / "base" / "original").mkdir()
    (root / "base" / "original" / "consolidated.00.pth").touch()
    with pytest.warns(UserWarning, match="also holds original/consolidated.00.pth, copied as it is"):
        apply_to_checkpoint(root / "base", [made], root / "out")


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("form", ["safetensors", "pickle", "patch", "lora"])
def test_a_full_disk(folders, form, monkeypatch):
    """the disk fills up while a patch, a checkpoint or an adapter is written: an OSError that names the file, nothing left"""
    import safetensors.torch
    from safetensors import SafetensorError

    base, tuned, heads, root = folders
    if form == "pickle":
        to_bin(root / "base")
    made = patch_from_checkpoints(root / "base", root / "tuned", heads)
    there = sorted(os.listdir(root))

    def copy_fails(*_, **__):
        raise shutil.Error([("a", "b", "[Errno 28] No space left"), ("c", "d", "the same")])

    with pytest.MonkeyPatch.context() as planted, pytest.raises(OSError, match="cannot be copied to .*out: .Errno 28. No space left$"):
        planted.setattr(shutil, "copytree", copy_fails)
        apply_to_checkpoint(root / "base", [made], root / "out")

    def full(*_, **__):
        raise RuntimeError("unexpected pos 64 vs 0") if form == "pickle" else SafetensorError("No space left on device")

    monkeypatch.setattr(*((torch, "save") if form == "pickle" else (safetensors.torch, "save_file")), full)
    with pytest.raises(OSError, match="cannot be written"):
        {"patch": lambda: made.save(root / "p.safetensors"), "lora": lambda: alps.export_lora(made, root / "base", root / "out")}.get(
            form, lambda: apply_to_checkpoint(root / "base", [made], root / "out"))()
    assert sorted(os.listdir(root)) == there
