"""`capturable`: the step counts, and all that depends on them, are tensors that the device alone reads.

On the CPU the same code counts in tensors of the CPU; torch's own `capturable` exists on accelerators alone, so that
its plain path is what we compare with.
"""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from alps_kernels.optim import HeadAdamW

from .cases import fill_grads, make, run, same_bytes, snapshot, toy
from .test_head_adamw import steps, twins, ulps

OPTIONS = [dict(weight_decay=0.3), dict(maximize=True, weight_decay=0.3), dict(amsgrad=True, betas=(0.7, 0.99)),
           dict(betas=(0.0, 0.0), eps=1e-3)]


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["a float lr", "a tensor lr"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_adamw_as_lr_changes(options, tensor_lr):
    ours, theirs = twins()
    lr = torch.tensor(1e-2, dtype=torch.float64) if tensor_lr else 1e-2
    optimizer = HeadAdamW(ours.parameters(), lr=lr, capturable=True, **options)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, **options)
    for step in range(20):
        now = 1e-2 / (1 + step % 3)
        plain.param_groups[0]["lr"] = now
        if tensor_lr:
            lr.fill_(now)
        else:
            optimizer.param_groups[0]["lr"] = now
        for model, optim in ((ours, optimizer), (theirs, plain)):
            steps(model, optim, 1, seed=step)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ulps(a.detach(), b.detach()) <= 2


def test_groups_have_their_own_numbers_and_parameters_their_own_age():
    ours, theirs = twins()
    made = []
    for model, kind in ((ours, HeadAdamW), (theirs, torch.optim.AdamW)):
        first, *rest = model.parameters()
        groups = [dict(params=[first], maximize=True, betas=(0.5, 0.9)), dict(params=rest, lr=0.03, weight_decay=0.5)]
        optimizer = kind(groups, lr=1e-2, **({"capturable": True} if kind is HeadAdamW else {}))
        for step in range(6):
            model(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            if step < 3:
                rest[-1].grad = None  # it joins later
            optimizer.step()
            optimizer.zero_grad()
        made.append([state["step"].item() for state in optimizer.state.values()])
    assert sorted(made[0]) == sorted(made[1]) == [3, 6, 6, 6, 6][:len(made[0])]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ulps(a.detach(), b.detach()) <= 2


@pytest.mark.parametrize("clip, dtype", product((None, 0.5), (torch.float32, torch.bfloat16)))
def test_found_inf_moves_nothing_and_takes_no_step(clip, dtype):
    """Steps under found_inf leave no trace in those that follow."""
    ends = []
    for skips in ((1, 3, 4), ()):
        params, bound = toy(dtype)
        optimizer = make(params, bound, capturable=True, max_grad_norm=clip)
        optimizer.grad_scale = torch.tensor(4.0)
        for step in range(6):
            if step in skips:
                before, states = snapshot(params), copy.deepcopy(list(optimizer.state.values()))
                optimizer.found_inf = torch.tensor([1.0])
                fill_grads(params, bound, torch.Generator().manual_seed(50), scale=float("inf"))
                optimizer.step()
                assert all(same_bytes(params[name], before[name]) for name in params)
                assert all(torch.equal(state[key], old[key]) for state, old in zip(
                    optimizer.state.values(), states, strict=True) for key in old)
            optimizer.found_inf = torch.tensor([0.0])
            fill_grads(params, bound, torch.Generator().manual_seed(step))
            optimizer.step()
        assert all(state["step"] == 6 for state in optimizer.state.values())
        ends.append(params)
    assert all(same_bytes(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_warm_step_and_a_cold_one_are_the_same():
    ends = []
    for fresh in (False, True):
        params, bound = toy()
        optimizer = make(params, bound, capturable=True)
        for step in range(5):
            optimizer._cache = None if fresh else optimizer._cache
            run(params, optimizer, bound, 1, seed=step)
            optimizer.param_groups[0]["betas"] = (0.9, 0.99) if step > 2 else (0.8, 0.9)
        ends.append(params)
    assert all(same_bytes(ends[0][name], ends[1][name]) for name in ends[0])


def test_it_goes_on_where_it_was_saved_also_without():
    """A count on the device is one of the host after loading, and back."""
    whole = None
    for switch in (None, 2, 3):
        params, bound = toy()
        optimizer = make(params, bound, capturable=True)
        for step in range(5):
            if step == switch:
                saved = copy.deepcopy(optimizer.state_dict())
                for group in saved["param_groups"]:
                    group["capturable"] = False
                optimizer = make(params, bound)
                optimizer.load_state_dict(saved)
                assert not optimizer.param_groups[0]["capturable"]
            run(params, optimizer, bound, 1, seed=step)
        whole = whole or params
        assert all(ulps(params[name].detach(), whole[name].detach()) <= 2 for name in params)


def test_a_parameter_that_leaves_is_counted_no_more():
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = HeadAdamW([a, b], capturable=True)
    for step in range(4):
        a.grad, b.grad = torch.ones(4), torch.ones(4) if step < 2 else None
        optimizer.step()
    assert optimizer.state[a]["step"] == 4 and optimizer.state[b]["step"] == 2
