"""What is allowed and seldom meant is said once, and not where it is meant."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.optim import first_steps, head_adamw
from alps_kernels.selection import selection
from tests.support.mutants import plant

from .models import loss_of, optimizer_of, some_heads, tiny, train

pytestmark = pytest.mark.fault("Warnings")


def said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("master, warned", [(None, True), ("split", False), ("kahan", False), ("stochastic", False)])
def test_sixteen_bits_without_a_master(dtype, master, warned):
    """bfloat16 or float16 weights with master=None: said when the optimizer is made, once"""
    model = tiny(dtype=dtype)
    heads = some_heads(model)
    texts = said(lambda: train(model, optimizer_of(model, heads, master=master), 5))
    assert [t for t in texts if "16 bits and no master" in t and "and 7 more" in t] == texts and len(texts) == warned


def test_wide_weights_need_no_master():
    """float32 weights with master=None: nothing is said, and after four steps nothing is looked at any more"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model), master=None)
    assert not said(lambda: train(model, optimizer, 5)) and optimizer._first_steps is None


@pytest.mark.parametrize("dtype, lr, warned", [
    (torch.float32, 1e-12, True), (torch.float32, 2e-5, False), (torch.bfloat16, 1e-12, True), (torch.bfloat16, 2e-5, False),
    (torch.float64, 1e-12, False), (torch.float32, 0.0, False)], ids=str)
def test_an_lr_at_which_nothing_moves(dtype, lr, warned):
    """a learning rate below half a step of next to all weights: said after the first step with it, once"""
    model = tiny(dtype=dtype)
    texts = said(lambda: train(model, optimizer_of(model, some_heads(model), lr=lr), 5))
    assert len(texts) == warned and all("lr 1e-12 is so small" in t for t in texts)


@pytest.mark.parametrize("lr, warned", [(1e-3, False), (1e-11, True)])
def test_an_lr_that_warms_up(lr, warned):
    """lr zero in the first step and fine later: nothing is said; too small later: said then"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(i / 10, 1.0))

    def go():
        for i in range(5):
            train(model, optimizer, 1, first=i)
            schedule.step()

    assert len(said(go)) == warned


def test_a_layer_frozen_after_the_heads_were_chosen():
    """selected heads in a layer with requires_grad False: said by name after three steps, once"""
    model = tiny()
    optimizer = optimizer_of(model, alps.HeadSelection.all(alps.find_heads(model)))
    model.model.layers[0].requires_grad_(False)
    texts = said(lambda: train(model, optimizer, 8))
    assert len(texts) == 1 and "layers.0.self_attn.q_proj.weight (and 2 more) holds selected heads but requires_grad is False" in texts[0]


@pytest.mark.parametrize("some", [True, False], ids=["one layer", "any"])
def test_gradients_that_never_come(some):
    """selected heads of layers that the loss does not reach (skipped, or no gradient at all): said after three steps, once"""
    model = tiny()
    optimizer = optimizer_of(model, alps.HeadSelection.all(alps.find_heads(model)))
    if some:
        layers, model.model.config.num_hidden_layers = model.model.layers, 1
        model.model.layers = layers[:1]

    def go():
        for i in range(8):
            optimizer.zero_grad()
            if some:
                loss_of(model, i).backward()
            optimizer.step()

    texts = said(go)
    assert len(texts) == 1 and "had no gradient in 3 steps" in texts[0]
    assert texts[0].startswith(f"model.layers.{int(some)}.self_attn.q_proj.weight (and {2 if some else 5} more)")


def test_gradients_that_are_zero_on_the_selection():
    """gradients that are zero on the selected slices: said by name after three steps, once"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model))
    part = optimizer.heads.params[0]

    def go():
        for i in range(8):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for block in part.blocks(part.param.grad):
                block.zero_()
            optimizer.step()

    texts = said(go)
    assert len(texts) == 1 and texts[0].startswith(part.name) and "its gradient was zero there in 3 steps" in texts[0]


def test_overflow_is_not_a_missing_gradient():
    """steps that a GradScaler skips do not count"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def go():
        for i in range(10):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i)).backward()
            if i < 5:
                optimizer.heads.params[0].param.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()

    assert not said(go)


def test_tied_weights():
    """selected heads in a weight that is also another module's: said when they are frozen; tied embeddings are not"""
    model = tiny(tie_word_embeddings=True)
    heads = some_heads(model)
    assert not said(lambda: heads.freeze(model)) and not said(lambda: heads.freeze(model, "trainable"))
    model.extra = nn.Linear(32, 32, bias=False)
    model.extra.weight = model.model.layers[0].self_attn.o_proj.weight
    heads = alps.HeadSelection([(0, 1)], heads.heads_per_layer, parts=("o",))
    layout = alps.find_heads(tiny())
    text, = said(lambda: heads.freeze(model, layout=layout))
    assert "layers.0.self_attn.o_proj.weight holds selected heads and is tied to extra.weight" in text


def test_ordinary_runs_say_nothing():
    """plain, sliced, reselected, copied, pickled and resumed runs: nothing is said"""
    def go():
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny(dtype=dtype)
            optimizer = optimizer_of(model, some_heads(model))
            train(model, optimizer, 5)
            optimizer.set_heads(some_heads(model, 2).freeze(model))
            train(model, optimizer, 5)
            for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
                train(*again((model, optimizer)), 4)
            alps.slice_heads(model, some_heads(model))
            train(model, alps.HeadAdamW(model.parameters(), heads=some_heads(model).bind(model)), 5)

    assert not said(go)


@pytest.mark.parametrize("module, edit, check", [
    (first_steps, ("slot.master is None and not again", "slot.master == 'split' and not again"), lambda: test_sixteen_bits_without_a_master(None, True, torch.bfloat16)),
    (first_steps, ("(values + lr == values) & (values - lr == values)", "values * 0 == 1"), lambda: test_an_lr_at_which_nothing_moves(torch.float32, 1e-12, True)),
    (first_steps, ("(values + lr == values) & (values - lr == values)", "values * 0 == 0"), lambda: test_an_lr_at_which_nothing_moves(torch.float32, 2e-5, False)),
    (first_steps, ('if float(g["lr"]) > 0', "if True"), lambda: test_an_lr_that_warms_up(1e-11, True)),
    (first_steps, ("self.idle - 1) < FIRST_STEPS:", "self.idle - 1) < 100:"), test_a_layer_frozen_after_the_heads_were_chosen),
    (first_steps, ("if not any_gradient]", "if any_gradient]"), test_gradients_that_are_zero_on_the_selection),
    (first_steps, ("if slot.param.requires_grad and slot.param.numel()", "if not slot.param.requires_grad"), lambda: test_gradients_that_never_come(True)),
    (head_adamw, ("                self._first_steps = None\n            return loss", "                pass\n            return loss"), test_a_layer_frozen_after_the_heads_were_chosen),
    (head_adamw, ("bool(cache.updates)):", "False):"), test_overflow_is_not_a_missing_gradient),
    (selection, ('(bound.rest == "frozen" or not part.full) and len', "len"), test_tied_weights),
    (selection, (" > 1:\n            warnings.warn", " > 2:\n            warnings.warn"), test_tied_weights),
], ids=["no master", "lr unseen", "lr everywhere", "lr zero", "too late", "zeros", "absent", "not once", "overflow", "ties of the rest", "ties"])
def test_faults_in_the_warnings_are_seen(module, edit, check, monkeypatch):
    """faults planted in what warns, each seen by the check beside it"""
    plant(monkeypatch, module, edit)
    with pytest.raises((AssertionError, ValueError)):
        check()
