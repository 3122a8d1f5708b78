"""Faults planted in head patches: each turns a check red, so that the checks are known to see."""

import copy

import pytest
import torch

import alps_kernels as alps
from alps_kernels import HeadPatch, apply_patch, export_lora, revert_patch, save_patch
from alps_kernels.patching import (
    applied, applied_patches, apply, apply_to_checkpoint, checkpoint, export, fit, make, patch, revert_checkpoint,
    slices_file,
)
from alps_kernels.weights import weights

from ..support.mutants import plant
from .cases import build, pick, same_bytes, snapshot, tune
from .test_apply import leaves_agree
from .test_export import differences, products


def round_trip(folder):
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    before, after = snapshot(base), snapshot(tuned)
    made = save_patch(tuned, folder / "p.safetensors", base=base)
    assert made.base is not None and made.selection == pick(base)
    apply_patch(base, folder / "p.safetensors")
    assert same_bytes(base, after) and alps.selection.selection_of(base) == pick(base)
    revert_patch(base)
    assert same_bytes(base, before) and alps.selection.selection_of(base) is None


def no_numbers(folder):
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    tuned.model.layers[0].self_attn.q_proj.weight.data[8].view(torch.int16)[:2] = torch.tensor([0x7FC1, -32768], dtype=torch.int16)
    save_patch(tuned, folder / "p.safetensors")
    apply_patch(base, folder / "p.safetensors")
    assert same_bytes(base, snapshot(tuned))


def other_bases_are_refused(folder):
    base = build(dtype=torch.bfloat16)
    for known in (None, base):
        save_patch(tune(base, pick(base)), folder / "p.safetensors", base=known)
        for name, place in (("model.norm.weight", 3), ("model.layers.0.self_attn.q_proj.weight", (7, 0)),
                            ("model.layers.1.self_attn.o_proj.weight", (0, 9)), ("lm_head.weight", (31, 23))):
            other = copy.deepcopy(base)
            dict(other.named_parameters())[name].data.view(torch.int16)[place] ^= 1
            before = snapshot(other)
            with pytest.raises(ValueError, match=name):
                apply_patch(other, folder / "p.safetensors")
            assert same_bytes(other, before)
    moved = tune(base, pick(base), seed=9)
    with pytest.raises(ValueError, match="where the patch would go"):
        apply_patch(moved, folder / "p.safetensors")
    with pytest.raises(ValueError, match="not be exact"):
        apply_patch(base.float(), folder / "p.safetensors")
    with pytest.raises(ValueError, match="outside the selected slices"):
        save_patch(tune(build(), pick(build(), ((0, 3),))), folder / "q.safetensors", pick(build()), base=build())


def damage_is_refused(folder):
    base = build(dtype=torch.bfloat16)
    save_patch(tune(base, pick(base)), folder / "p.safetensors", base=base)
    data = (folder / "p.safetensors").read_bytes()
    (folder / "p.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="not those that were written"):
        HeadPatch.load(folder / "p.safetensors")


def overlaps_are_refused(folder):
    base = build()
    for name, heads in (("a", ((0, 0),)), ("b", ((0, 1),)), ("c", ((1, 3),))):
        save_patch(tune(base, pick(base, heads)), folder / f"{name}.safetensors", base=base)
    before = snapshot(base)
    with pytest.raises(ValueError, match="share key/value groups"):
        apply_patch(base, [folder / "a.safetensors", folder / "b.safetensors"])
    assert same_bytes(base, before)
    apply_patch(base, folder / "a.safetensors")
    with pytest.raises(ValueError, match="share key/value groups"):
        apply_patch(base, folder / "b.safetensors")
    apply_patch(base, folder / "c.safetensors")
    revert_patch(base, "a")
    apply_patch(base, folder / "b.safetensors")
    revert_patch(base)
    assert same_bytes(base, before)


def swaps(folder):
    base = build(dtype=torch.bfloat16)
    before, tuned = snapshot(base), {}
    for seed, name in enumerate("ab"):
        tuned[name] = tune(base, pick(base, ((0, 1), (1, seed))), seed=seed)
        save_patch(tuned[name], folder / f"{name}.safetensors", base=base)
    where = {name: param.data_ptr() for name, param in base.named_parameters()}
    for name in "aba":
        apply_patch(base, folder / f"{name}.safetensors", replace=True)
        assert same_bytes(base, snapshot(tuned[name]))
    revert_patch(base)
    assert same_bytes(base, before) and where == {name: param.data_ptr() for name, param in base.named_parameters()}


def interrupts_are_undone(folder):
    base = build()
    save_patch(tune(base, pick(base)), folder / "p.safetensors", base=base)
    before, register = snapshot(base), applied._register
    calls = []

    def failing(*arguments):
        register(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt

    applied._register = failing
    try:
        with pytest.raises(KeyboardInterrupt):
            apply_patch(base, folder / "p.safetensors")
    finally:
        applied._register = register
    assert same_bytes(base, before) and not applied_patches(base) and alps.selection.selection_of(base) is None


def sliced(folder):
    base = build()
    tuned, before = tune(base, pick(base)), snapshot(base)
    save_patch(tuned, folder / "p.safetensors")
    alps.slice_heads(base, pick(base))
    apply_patch(base, folder / "p.safetensors")
    base(input_ids=torch.arange(4)[None])
    assert same_bytes(base, snapshot(tuned)) and leaves_agree(base)
    save_patch(base, folder / "p.safetensors")
    revert_patch(base)
    base(input_ids=torch.arange(4)[None])
    assert same_bytes(base, before)


def folders(folder):
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    base.save_pretrained(folder / "base", max_shard_size="4KB")
    made = save_patch(tuned, folder / "p.safetensors", base=folder / "base")
    apply_to_checkpoint(folder / "base", [made], folder / "out")
    assert same_bytes(type(base).from_pretrained(folder / "out", dtype="auto"), snapshot(tuned))
    revert_checkpoint(folder / "out", folder / "back")
    for file in (folder / "base").iterdir():
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes()
    assert len(list((folder / "back").iterdir())) == len(list((folder / "base").iterdir()))


def loras(folder):
    for name in ("llama", "gpt2 (Conv1D)", "qwen2 (bias)"):
        base = build(name, torch.bfloat16)
        tuned = tune(base, pick(base))
        made = save_patch(tuned, folder / "p.safetensors", base=base)
        export_lora(made, base, folder / f"{name} exact")
        found = products(folder / f"{name} exact", {"fan_in_fan_out": "gpt2" in name})
        wanted = differences(base, tuned)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
        low = export_lora(made, base, folder / f"{name} low", rank=2)
        found = products(folder / f"{name} low", {"fan_in_fan_out": "gpt2" in name})
        for key, module in low.modules.items():
            key += ".weight"
            best = torch.linalg.svdvals(wanted[key])[2:].norm() / wanted[key].norm()
            left = (wanted[key] - found[key]).norm() / wanted[key].norm()
            assert module.rank == 2 and abs(module.error - left) < 1e-5 > abs(left - best)


FAULTS = [
    # module, check that must turn red, edits
    (slices_file, round_trip, ("block.copy_(part)", "block.copy_(part.flip(0))")),
    (slices_file, no_numbers, ("block.copy_(part)", "block.copy_(part.nan_to_num(0.0))")),
    (slices_file, no_numbers, ("block.copy_(part)", "block.add_(part - block)")),
    (slices_file, damage_is_refused, ("if digest(values) != entry.get(\"values\"):", "if False:")),
    (slices_file, other_bases_are_refused, ("return blocks(tensor, self.dim, complement(self.ranges, self.matrix[self.dim]))", "return []")),
    (slices_file, other_bases_are_refused, ("complement(self.ranges, self.matrix[self.dim]))", "complement(self.ranges, self.matrix[self.dim])[1:])")),
    (fit, other_bases_are_refused, ("if digest(*([tensor] if cut is None else cut.rest(tensor))) != patch.outside[name].digest:", "if False:")),
    (fit, other_bases_are_refused, ("    found = in_threads(differs, patch.outside)", "    found = in_threads(differs, patch.cuts)")),
    (fit, other_bases_are_refused, ("return \"inside\" if cut is not None and patch.base is not None else None", "return None")),
    (fit, other_bases_are_refused, ("        if there != here:", "        if there.shape != here.shape:")),
    (make, other_bases_are_refused, ("if len(set(digests)) > 1]", "if False]")),
    (fit, overlaps_are_refused, ("if a.dim == b.dim and not shared:", "if True:")),
    (fit, overlaps_are_refused, ("if a.dim == b.dim and not shared:", "if not set(one.selection) & set(other.selection):")),
    (apply, overlaps_are_refused, ("for other in (*(entry.patch for entry in staying), *incoming[:at]):", "for other in incoming[:at]:")),
    (apply, overlaps_are_refused, ("for other in (*(entry.patch for entry in staying), *incoming[:at]):", "for other in (entry.patch for entry in staying):")),
    (apply, overlaps_are_refused, ("entry.patch.cuts[name].put(entry.originals[name], tensor)", "pass")),
    (apply, round_trip, ("kept = {name: cut.take(original(name, weights.read([name])[name]))", "kept = {name: patch.values[name]")),
    (applied, round_trip, ("        remember(model, entry)", "        entry is None and remember(model, entry)")),
    (applied, round_trip, ("        remember(model, entry)", "        entry is None or remember(model, entry)")),
    (apply, swaps, ("leaving, staying = (now, ()) if replace else ((), now)", "leaving, staying = ((), ()) if replace else ((), now)")),
    (apply, swaps, ("kept = {name: cut.take(original(name, weights.read([name])[name]))", "kept = {name: cut.take(weights.read([name])[name])")),
    (applied, swaps, ("    put(values, param.detach())", "    param.data = param.data.clone(); put(values, param.detach())")),
    (applied, interrupts_are_undone, ("        _restore(weights, before)\n", "        pass\n")),
    (applied, interrupts_are_undone, ("        _register(weights.model, models, known, trained)\n", "        pass\n")),
    (applied, interrupts_are_undone, ("before = [(name, cut, cut.take(weights.read([name])[name])) for", "before = [(name, cut, values) for"), ("for name, cut, _ in writes]", "for name, cut, values in writes]")),
    (applied, sliced, ("        leaf.copy_(synced.cut(param))", "        pass")),
    (weights, sliced, ("if synced_slice_of(param) is None}", "if True}")),
    (patch, round_trip, ("base if known_base else None", "None")),
    (checkpoint, folders, ("raw_file.seek(8 + size + start)\n            raw_file.write", "raw_file.seek(8 + start)\n            raw_file.write")),
    (checkpoint, folders, ("old[key] = cuts[key].take(tensor)", "pass"), ("new[key] = cuts[key].take(tensor)", "new[key] = old[key] = cuts[key].take(tensor)")),
    (checkpoint, folders, ("            (folder / spent.relative_to(checkpoint)).unlink()", "            pass")),
    (export, loras, ("b, a = a.t(), b.t()", "pass")),
    (export, loras, ("return (spread, far, made) if cut.dim == 0 else (far.t(), spread.t(), made)", "return spread, far, made")),
    (export, loras, ("places = torch.cat([torch.arange(start, stop,", "places = torch.cat([torch.arange(start - start, stop - start,")),
    (export, loras, ("left / norm if norm else 0.0", "(left / norm) ** 2")),
    (export, loras, ("near, far = (u[:, :rank] * root).float()", "near, far = (u[:, -rank:] * root).float()")),
    (export, loras, ("                patch.cuts[biases[name]].put(_delta(patch, weights, biases[name]), bias)", "                pass")),
    (export, loras, (".sub_(base)", "")),
]
CHECKS = sorted({check for _, check, *_ in FAULTS}, key=lambda check: check.__name__)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checks_pass_without_a_fault(check, tmp_path):
    check(tmp_path)


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("at", range(len(FAULTS)))
def test_a_planted_fault_is_seen(at, tmp_path, monkeypatch):
    """faults planted in head patches and their exports, each seen by the check beside it"""
    module, check, *edits = FAULTS[at]
    plant(monkeypatch, module, *edits)
    try:
        check(tmp_path)
    except (AssertionError, ValueError, IndexError, pytest.fail.Exception):
        return
    monkeypatch.undo()
    pytest.fail(f"{check.__name__} did not see {edits}")
