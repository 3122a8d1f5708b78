"""Head patches in trouble: interrupts and failing operations in the middle of a swap."""

import pytest
import torch

from alps_kernels import HeadPatch, apply_patch, revert_patch, save_patch
from alps_kernels.patching import applied, applied_patches
from alps_kernels.selection import selection_of
from alps_kernels.slicing import slice_heads
from alps_kernels.tensors import synced_slices_in
from tests.patching.cases import build, pick, same_bytes, snapshot, tune
from tests.support.mutants import plant

from .injected import FailingOp, Injected, failing_line, torch_oom

HEADS = {"a": ((0, 1), (1, 0)), "b": ((0, 1), (1, 3))}


@pytest.fixture(params=["plain", "sliced"])
def case(request, tmp_path):
    """A model and two patches of it that overlap."""
    base = build(dtype=torch.bfloat16)
    patches = {name: save_patch(tune(base, pick(base, heads), seed=len(name)), tmp_path / f"{name}.safetensors", base=base)
               for name, heads in HEADS.items()}
    if request.param == "sliced":
        slice_heads(base, pick(base, HEADS["a"]))
    return base, patches


ACTIONS = {  # what is on the model before, and what is done
    "apply": (None, lambda model, patches: apply_patch(model, patches["a"], verify=False)),
    "swap": ("a", lambda model, patches: apply_patch(model, patches["b"], replace=True, verify=False)),
    "revert": ("a", lambda model, patches: revert_patch(model)),
}


def state_of(model):
    return snapshot(model), applied_patches(model), selection_of(model)


def prepared(case, action):
    """The model ready for an action, its state before and after, and a function that makes it ready again."""
    model, patches = case
    on, act = ACTIONS[action]

    def ready():
        apply_patch(model, patches[on], replace=True, verify=False) if on else revert_patch(model) if applied_patches(model) else None

    ready()
    before = state_of(model)
    act(model, patches)
    after = state_of(model)
    ready()
    assert same(model, before)
    return model, patches, act, before, after, ready


def same(model, state):
    snap, names, selection = state
    return (same_bytes(model, snap) and applied_patches(model) == names and selection_of(model) == selection
            and all(torch.equal(mirror.leaf, mirror.cut(mirror.weight)) for _, mirror in synced_slices_in(model)))


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("action", ACTIONS)
def test_an_interrupt_at_every_line_of_a_swap(case, action):
    """KeyboardInterrupt before each line of the writing part of a patch's apply, swap and revert: old or new, never between"""
    model, patches, act, before, after, ready = prepared(case, action)
    with failing_line() as lines:
        act(model, patches)
    ready()
    ended, first = set(), max(0, lines[0] - 350)
    for at in (*range(0, first, 97), *range(first, lines[0])):
        with pytest.raises(KeyboardInterrupt), failing_line(at):
            act(model, patches)
        old, new = same(model, before), same(model, after)
        assert old or new, f"torn at line {at} of {lines[0]}"
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), f"gradients left off at line {at}"
        ended.add("old" if old else "new")
        ready()
    assert "old" in ended


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("error", [torch_oom, Injected], ids=["out of memory", "any error"])
@pytest.mark.parametrize("action", ACTIONS)
def test_each_operation_of_a_swap_fails(case, action, error):
    """each torch operation of a patch's apply, swap and revert fails in turn: the model is as it was"""
    model, patches, act, before, after, ready = prepared(case, action)
    for at in range(10_000):
        try:
            with FailingOp(at, error):
                act(model, patches)
            break
        except (Injected, torch.OutOfMemoryError):
            assert same(model, before), f"torn at operation {at}"
    assert at > 20 and same(model, after)


@pytest.mark.fault("All or nothing")
def test_a_swap_without_its_way_back_would_be_seen(case, monkeypatch):
    """a swap planted to leave half of its writes when it fails: the checks above turn red"""
    plant(monkeypatch, applied, ("        _restore(weights, before)\n", "        pass\n"))
    with pytest.raises(AssertionError, match="torn"):
        test_each_operation_of_a_swap_fails(case, "apply", Injected)


@pytest.mark.fault("Bad input")
@pytest.mark.parametrize("mode", ["folder", "file"])
def test_a_place_that_cannot_be_written(tmp_path, mode):
    """a patch saved into a missing folder or over a folder: a plain OSError, nothing written"""
    base = build()
    target = tmp_path / "missing" / "p.safetensors" if mode == "folder" else tmp_path / "taken"
    if mode == "file":
        target.mkdir()
    with pytest.raises(OSError):
        save_patch(base, target, pick(base))
    assert [file.name for file in tmp_path.rglob("*")] == (["taken"] if mode == "file" else [])


@pytest.mark.fault("Bad input")
def test_a_patch_file_that_changes_after_it_was_read(tmp_path):
    """the file of a patch overwritten after loading: what was checked is what is applied"""
    base = build()
    tuned = tune(base, pick(base))
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    loaded = HeadPatch.load(tmp_path / "p.safetensors")
    data = (tmp_path / "p.safetensors").read_bytes()
    with open(tmp_path / "p.safetensors", "r+b") as file:
        file.write(bytes(len(data)))
    apply_patch(base, loaded)
    assert same_bytes(base, snapshot(tuned))
