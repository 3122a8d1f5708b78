"""What a failing step may leave behind: every frozen byte, and every parameter whole, before or after its step."""

import copy

import pytest
import torch

import alps_kernels as alps
from alps_kernels.ops.adamw import cpu
from tests.optim.cases import fill_grads, make, masks, run, snapshot, toy
from tests.support.mutants import plant

from .injected import FailingOp, Injected, failing_line, torch_oom
from .models import assert_same, bytes_of, loss_of, optimizer_of, same, some_heads, state_of, tiny, train

PRECISIONS = [(torch.float32, "split", torch.float32), (torch.bfloat16, "split", torch.float32),
              (torch.bfloat16, "kahan", torch.bfloat16), (torch.bfloat16, "stochastic", torch.bfloat16),
              (torch.bfloat16, "split", "8bit")]


def prepared(dtype, master, moments, warm):
    """Parameters with gradients, some steps taken or none, and what a step makes of them."""
    params, bound = toy(dtype, n=32, d=24)
    options = dict(master=master, moment_dtype=moments, max_grad_norm=1e6)
    optimizer = make(params, bound, **options)
    run(params, optimizer, bound, 2 if warm else 0)
    fill_grads(params, bound, torch.Generator().manual_seed(9))
    after, stepped = copy.deepcopy((params, optimizer))
    for name, p in after.items():
        p.grad = params[name].grad.clone()
    stepped.step()
    return params, bound, optimizer, after, stepped


def whole(params, bound, optimizer, before, after, stepped):
    """Asserts that every parameter is entirely as before or entirely as after; returns how many moved."""
    moved = 0
    inside = masks(params, bound)
    for name, param in params.items():
        assert same(param[~inside[name]], before[0][name][~inside[name]]), f"frozen bytes of {name}"
        now, then, new = (o.state.get(p[name]) or {} for o, p in
                          ((optimizer, params), (before[1], before[0]), (stepped, after)))
        stays = same(param, before[0][name]) and now.keys() == then.keys() and all(same(now[k], then[k]) for k in now)
        goes = same(param, after[name]) and now.keys() == new.keys() and all(same(now[k], new[k]) for k in now)
        assert stays or goes, f"{name} is torn: step {now.get('step')}"
        moved += goes and not stays
    return moved


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize("dtype, master, moments, error", [
    *[(*precision, torch_oom) for precision in PRECISIONS], (*PRECISIONS[0], KeyboardInterrupt), (*PRECISIONS[0], Injected)],
    ids=lambda value: getattr(value, "__name__", str(value)))  # no addresses: xdist compares them
def test_an_operation_of_the_step_fails(dtype, master, moments, error, warm):
    """each torch operation of a step fails in turn (of Philox's thousands some): nothing moved, a retry is the step"""
    params, bound, optimizer, after, stepped = prepared(dtype, master, moments, warm)
    before = copy.deepcopy((params, optimizer))
    for at in range(0, 100_000, 1 if moments == torch.float32 else 97):
        try:
            with FailingOp(at, error):
                optimizer.step()
            break
        except (torch.OutOfMemoryError, KeyboardInterrupt, Injected):
            assert whole(params, bound, optimizer, before, after, stepped) == 0
    assert at > 20 and whole(params, bound, optimizer, before, after, stepped) == len(bound.params)


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("limit", [0, 2**20], ids=["each parameter by itself", "together"])
@pytest.mark.parametrize("dtype, master, moments", PRECISIONS[:2], ids=str)
def test_an_interrupt_at_every_line(dtype, master, moments, limit, monkeypatch):
    """KeyboardInterrupt before each line that a step runs: no parameter is torn, a retry goes on"""
    monkeypatch.setattr(cpu, "PENDING", limit)
    params, bound, optimizer, after, stepped = prepared(dtype, master, moments, True)
    before = copy.deepcopy((params, optimizer))
    seen = set()
    for at in range(10_000):
        trial, other = copy.deepcopy((params, optimizer))
        for name, p in trial.items():
            p.grad = params[name].grad
        try:
            with failing_line(at):
                other.step()
            break
        except KeyboardInterrupt:
            seen.add(whole(trial, bound, other, before, after, stepped))
        if at % 25 == 0:
            other.step()
            assert all(other.state[part.param]["step"].max() in (3, 4) for part in other.heads.params)
    assert at > 100 and {0, 4} <= seen and (seen == {0, 4}) == (limit > 0)


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("error", [torch_oom, KeyboardInterrupt], ids=["out of memory", "interrupt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_operation_of_a_sliced_step_fails(family, error):
    """each torch operation of a step on sliced leaves fails in turn: leaves, full weights and state as they were"""
    model = tiny(family, dtype=torch.bfloat16)
    optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, heads=alps.slice_heads(model, some_heads(model)))
    train(model, optimizer, 2)
    loss_of(model, 5).backward()
    weights, state = {name: p.detach().clone() for name, p in model.named_parameters()}, state_of(optimizer)
    for at in range(0, 10_000, 3):
        try:
            with FailingOp(at, error):
                optimizer.step()
            break
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            assert_same({name: p.detach() for name, p in model.named_parameters()}, weights)
            assert_same(state_of(optimizer), state)
    assert at > 20 and all(state["step"] == 3 for state in optimizer.state.values())


@pytest.mark.fault("All or nothing")
def test_a_torn_step_would_be_seen(monkeypatch):
    """the step planted to write parameter, moments and step count one after another: the checks above turn red"""
    plant(monkeypatch, cpu, ("torch._foreach_copy_(*zip(*pairs, strict=True))",
                             "[place.copy_(value) for place, value in pairs]"))
    for check in (lambda: test_an_operation_of_the_step_fails(*PRECISIONS[0], Injected, True),
                  lambda: test_an_interrupt_at_every_line(*PRECISIONS[0], 2**20, monkeypatch)):
        with pytest.raises(AssertionError, match="torn"):
            check()


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("where", ["before backward", "after backward", "in the middle of backward"])
def test_a_closure_fails(where):
    """a closure that raises leaves weights and state as they were"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model))
    train(model, optimizer, 2)
    weights, state = bytes_of(model), state_of(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 5)
        if where == "before backward":
            raise Injected
        if where == "in the middle of backward":
            model.model.layers[0].mlp.up_proj.weight.requires_grad_(True).register_hook(lambda _: 1 / 0)
            loss = loss_of(model, 5)
        loss.backward()
        raise Injected

    with pytest.raises((Injected, ZeroDivisionError)):
        optimizer.step(closure)
    assert_same(bytes_of(model), weights)
    assert_same(state_of(optimizer), state)


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("dtype, master, moments", [
    *PRECISIONS[:2], *[pytest.param(*precision, marks=pytest.mark.slow) for precision in PRECISIONS[2:]]], ids=str)
def test_a_thousand_steps(dtype, master, moments):
    """1,000 steps with weight decay, changing gradients and NaN outside the selection"""
    params, bound = toy(dtype, n=32, d=24)
    before = snapshot(params)
    run(params, make(params, bound, master=master, moment_dtype=moments), bound, 1000)
    for name, inside in masks(params, bound).items():
        assert same(params[name][~inside], before[name][~inside]), name
        assert not inside.any() or not torch.equal(params[name], before[name])


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("rest", ["frozen", "trainable"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_reselection(family, rest):
    """five selections one after another: what leaves a selection never moves again, momentum or not"""
    model = tiny(family)
    optimizer = optimizer_of(model, some_heads(model, 0), rest)
    for seed in range(5):
        heads = some_heads(model, seed)
        optimizer.set_heads(heads.freeze(model, rest))
        with alps.guard(model, heads):
            train(model, optimizer, 3, first=10 * seed)


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overflow_under_a_scaler(dtype):
    """AMP: gradients overflow in some steps; those move nothing and count for nothing"""
    model = tiny(dtype=dtype)
    heads = some_heads(model)
    optimizer = optimizer_of(model, heads)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    taken = 0
    with alps.guard(model, heads):
        for i in range(12):
            optimizer.zero_grad()
            before, state = bytes_of(model), state_of(optimizer)
            scaler.scale(loss_of(model, i)).backward()
            overflow = i % 3 == 1
            if overflow:
                optimizer.heads.params[0].param.grad[0] = [float("inf"), float("nan")][i % 2]
            scaler.step(optimizer)
            scaler.update()
            taken += not overflow
            if overflow:
                assert_same(bytes_of(model), before)
                assert_same(state_of(optimizer), state)
    assert all(entry["step"] == taken for entry in optimizer.state.values())


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clipped"])
def test_gradients_that_are_no_numbers(value, clip):
    """NaN or infinite gradients everywhere: the selection is ruined, as with torch, and nothing else"""
    model = tiny()
    heads = some_heads(model)
    optimizer = optimizer_of(model, heads, max_grad_norm=clip)
    with alps.guard(model, heads):
        train(model, optimizer, 2)
        for param in model.parameters():
            param.grad = torch.full_like(param, value)
        optimizer.step()


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("kept", [True, False], ids=["accumulated in .grad", "summed losses"])
def test_gradient_accumulation(kept):
    """four micro-batches a step, accumulated in .grad or in one graph: frozen bytes stay, both give the same step"""
    model = tiny()
    heads = some_heads(model)
    optimizer = optimizer_of(model, heads)
    with alps.guard(model, heads):
        for step in range(3):
            optimizer.zero_grad()
            losses = [loss_of(model, 4 * step + i) / 4 for i in range(4)] if not kept else []
            if kept:
                for i in range(4):
                    (loss_of(model, 4 * step + i) / 4).backward()
            else:
                sum(losses).backward()
            optimizer.step()


@pytest.mark.fault("Frozen bytes")
def test_an_interrupted_step_and_what_follows():
    """a run interrupted in the middle of steps that goes on: frozen bytes stay"""
    model = tiny(dtype=torch.bfloat16)
    heads = some_heads(model)
    optimizer = optimizer_of(model, heads)
    with alps.guard(model, heads):
        for i in range(10):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            try:
                with failing_line(37 * i):
                    optimizer.step()
            except KeyboardInterrupt:
                continue


@pytest.mark.fault("Frozen bytes")
@pytest.mark.parametrize("sliced", [False, True], ids=["plain", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_resume(dtype, sliced, tmp_path):
    """saved, trained on, loaded back and resumed, three times over: frozen bytes stay those of the base"""
    model = tiny(dtype=dtype)
    heads = some_heads(model)
    bound = alps.slice_heads(model, heads) if sliced else heads.freeze(model)
    optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, heads=bound)
    with alps.guard(model, heads):
        for i in range(3):
            train(model, optimizer, 2, first=i)
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "it.pt")
            train(model, optimizer, 2, first=50)
            weights, state = torch.load(tmp_path / "it.pt", weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
