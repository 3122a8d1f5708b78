"""slice_heads, patches, freezing and loading a state under errors at every operation and interrupts at every line."""

import copy
import itertools

import pytest
import torch

import alps_kernels as alps
from alps_kernels.selection import selection_of

from .injected import FailingOp, Injected, failing_line
from .models import assert_same, optimizer_of, same, some_heads, tiny, train

pytestmark = pytest.mark.fault("All or nothing")


def picture(model):
    """All that a call may change of a model: parameters (which objects, bytes, flags), classes, what is remembered."""
    return {
        "params": {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "keys": list(model.state_dict()), "selection": selection_of(model),
        "patches": alps.applied_patches(model), "noted": [sorted(m.__dict__) for m in model.modules()],
    }


def assert_picture(model, before, *, objects=True):
    now = picture(model)
    assert now["params"].keys() == before["params"].keys()
    for name, (key, value, trains) in before["params"].items():
        new_key, new_value, new_trains = now["params"][name]
        assert same(value, new_value) and trains == new_trains, name
        assert key == new_key or not objects, f"{name} is another object"
    for what in ("classes", "keys", "selection", "patches", "noted"):
        assert now[what] == before[what], what


def sliced_model(family):
    model = tiny(family)
    alps.slice_heads(model, some_heads(model, 7))
    return model


def patched(family, path):
    """A base model and a patch of it."""
    base, tuned = tiny(family), tiny(family)
    heads = some_heads(tuned)
    train(tuned, optimizer_of(tuned, heads), 1)
    alps.save_patch(tuned, path)
    return base


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("action", ["slice", "slice again", "unslice", "freeze", "apply", "revert"])
def test_an_operation_fails(action, family, tmp_path):
    """slicing, slicing for another selection, unslicing, freezing, applying and reverting a patch: each torch operation fails in turn"""
    model = tiny(family)
    if action in ("apply", "revert"):
        model = patched(family, tmp_path / "p.safetensors")
        patch = alps.HeadPatch.load(tmp_path / "p.safetensors")
    if action in ("slice again", "unslice"):
        model = sliced_model(family)
    if action == "revert":
        alps.apply_patch(model, patch)
    heads = some_heads(model)
    call = {"slice": lambda: alps.slice_heads(model, heads), "slice again": lambda: alps.slice_heads(model, heads),
            "unslice": lambda: alps.unslice_heads(model), "freeze": lambda: heads.freeze(model),
            "apply": lambda: alps.apply_patch(model, patch),
            "revert": lambda: alps.revert_patch(model)}[action]
    before = picture(model)
    for at in itertools.count():
        try:
            with FailingOp(at):
                call()
            break
        except Injected:
            assert_picture(model, before)
    assert at >= (0 if action == "freeze" else 2)


@pytest.mark.parametrize("action, step", [("slice", 7), ("freeze", 5), ("set_heads", 5), ("load_state_dict", 41)])
def test_an_interrupt_at_a_line(action, step):
    """KeyboardInterrupt before every few lines of slice_heads, freeze, set_heads and load_state_dict: as it was, or as it should be"""
    model = tiny()
    heads = some_heads(model)
    optimizer = optimizer_of(model, some_heads(model, 5)) if action in ("set_heads", "load_state_dict") else None
    if optimizer is not None:
        train(model, optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 1)
        bound = heads.bind(model)
    layout = alps.find_heads(model)
    call = {"slice": lambda: alps.slice_heads(model, heads, layout=layout),
            "freeze": lambda: heads.freeze(model, layout=layout),
            "set_heads": lambda: optimizer.set_heads(bound), "load_state_dict": lambda: optimizer.load_state_dict(saved)}[action]
    undo = {"slice": lambda: alps.unslice_heads(model), "freeze": lambda: None,
            "set_heads": lambda: None, "load_state_dict": lambda: None}[action]
    before = picture(model)
    state = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None
    for at in itertools.count(0, step):
        try:
            with failing_line(at):
                call()
            break
        except KeyboardInterrupt:
            if optimizer is not None:
                assert_state(optimizer, state)
            assert_picture(model, before)
    undo()
    assert at > 40


def assert_state(optimizer, before):
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"] and now["alps"] == before["alps"]
    assert_same(*[{i: {k: v for k, v in entry.items() if isinstance(v, torch.Tensor)} for i, entry in s["state"].items()}
                  for s in (now, before)])


def test_operations_of_loading_a_state_fail():
    """each torch operation of HeadAdamW.load_state_dict and set_heads fails in turn: the optimizer is as it was"""
    model = tiny(dtype=torch.bfloat16)
    optimizer = optimizer_of(model, some_heads(model, 5))
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1)
    bound = some_heads(model).bind(model)
    state = copy.deepcopy(optimizer.state_dict())
    for call in (lambda: optimizer.load_state_dict(saved), lambda: optimizer.set_heads(bound)):
        for at in itertools.count():
            try:
                with FailingOp(at):
                    call()
                break
            except Injected:
                assert_state(optimizer, state)
        assert at > 10
        optimizer = optimizer_of(model, some_heads(model, 5))
        optimizer.load_state_dict(state)
