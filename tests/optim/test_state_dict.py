"""State dicts: both ways with torch, bit-equal resume, refusals that change nothing, reselection."""

import copy
import io

import pytest
import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam

from .cases import assert_frozen, bind, fill_grads, make, masks, run, same_bytes, selection, snapshot, toy

PRECISIONS = [
    (torch.float32, "split", torch.float32),
    (torch.float32, None, torch.bfloat16),
    (torch.bfloat16, "split", torch.float32),
    (torch.bfloat16, "kahan", torch.bfloat16),
    (torch.bfloat16, "stochastic", torch.bfloat16),
    (torch.float16, "split", torch.float32),
    (torch.float16, "stochastic", torch.float32),
    (torch.float16, None, torch.float32),
    (torch.float32, None, "8bit"),
    (torch.bfloat16, "split", "8bit"),
]
CODES = {"8bit": [torch.int8, torch.uint8]}


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_dicts_load_both_ways_where_whole_parameters_train(amsgrad):
    def twin():
        torch.manual_seed(0)
        return [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3))]

    def go(params, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    straight, ours, theirs = twin(), twin(), twin()
    optimizers = [torch.optim.AdamW(straight, amsgrad=amsgrad), HeadAdamW(ours, amsgrad=amsgrad),
                  torch.optim.AdamW(theirs, amsgrad=amsgrad)]
    for params, optimizer in zip((straight, ours, theirs), optimizers, strict=True):
        go(params, optimizer, 1)
    saved = [through_file(optimizer.state_dict()) for optimizer in optimizers]
    into_torch, into_ours = torch.optim.AdamW(ours, amsgrad=amsgrad), HeadAdamW(theirs, lr=1.0, amsgrad=amsgrad)
    into_torch.load_state_dict(saved[1])
    into_ours.load_state_dict(saved[2])
    assert into_ours.param_groups[0]["lr"] == 1e-3 and into_ours.param_groups[0]["master"] == "split"
    for params, optimizer in ((straight, optimizers[0]), (ours, into_torch), (theirs, into_ours)):
        go(params, optimizer, 2)
    for a, b, c in zip(straight, ours, theirs, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.fault("Resume", "saved after one and four steps in every precision, loaded into fresh objects: the same bytes three steps on")
@pytest.mark.parametrize("dtype, master, moments", PRECISIONS, ids=str)
@pytest.mark.parametrize("stop", [1, 4])
def test_resume_is_bit_equal_and_keeps_dtypes(dtype, master, moments, stop):
    options = dict(master=master, moment_dtype=moments, amsgrad=stop == 4 and moments != "8bit", max_grad_norm=3.0, seed=7)
    params, bound = toy(dtype)
    optimizer = make(params, bound, **options)
    run(params, optimizer, bound, stop)
    weights, state = through_file([snapshot(params), optimizer.state_dict()])
    run(params, optimizer, bound, 3, seed=5)

    again, rebound = toy(dtype, seed=99)
    for name, p in again.items():
        p.data.copy_(weights[name])
    other = make(again, rebound, **{**options, "seed": 0})
    other.load_state_dict(state)
    for part in rebound.params:
        entry = other.state[part.param]
        assert [entry["exp_avg"].dtype, entry["exp_avg_sq"].dtype] == CODES.get(moments, [moments] * 2)
        assert entry["step"].dtype == torch.float32 and ("exp_avg_scale" in entry) == (moments == "8bit")
        assert ("master_lo" in entry) == (master == "split" and dtype != torch.float32)
    run(again, other, rebound, 3, seed=5)
    assert all(same_bytes(again[name], params[name]) for name in params)


def test_loading_does_not_share_memory_with_the_file():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    saved = optimizer.state_dict()
    other_params, other_bound = toy()
    other = make(other_params, other_bound)
    other.load_state_dict(saved)
    before = copy.deepcopy(saved["state"])
    run(other_params, other, other_bound, 1)
    assert all(torch.equal(before[i][key], saved["state"][i][key]) for i in before for key in before[i])


def test_a_dense_amsgrad_state_is_refused_for_8_bit_moments():
    params, bound = toy()
    dense = torch.optim.AdamW(params.values(), lr=1e-2, amsgrad=True)
    run(params, dense, bound, 2, outside=0.5)
    optimizer = make(params, bound, moment_dtype="8bit")
    with pytest.raises(ValueError, match="group 0 of the state dict: amsgrad has no 8-bit form"):
        optimizer.load_state_dict(dense.state_dict())
    assert not optimizer.state and not optimizer.param_groups[0]["amsgrad"]


def test_a_dense_state_is_cut_and_ours_spreads_to_a_dense_one():
    params, bound = toy()
    dense = torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.1)
    run(params, dense, bound, 3, outside=0.5)
    start = snapshot(params)
    optimizer = make(params, bound, lr=5.0)
    optimizer.load_state_dict(dense.state_dict())
    inside = masks(params, bound)
    back = optimizer.dense_state_dict()
    for index, name in enumerate(params):
        if name == "frozen":
            assert params[name] not in optimizer.state and index not in back["state"]
            continue
        for key in ("exp_avg", "exp_avg_sq"):
            kept, full = back["state"][index][key], dense.state[params[name]][key]
            assert torch.equal(kept[inside[name]], full[inside[name]]) and not kept[~inside[name]].any()
    run(params, optimizer, bound, 2, seed=8)
    assert_frozen(params, start, bound)

    # and torch goes on from the dense one just as we do, on what trains
    theirs = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    plain = torch.optim.AdamW(theirs.values())
    plain.load_state_dict(back)
    assert set(plain.param_groups[0]) == set(dense.param_groups[0])
    generator = torch.Generator().manual_seed(8)
    for _ in range(2):
        fill_grads(params, bound, generator)
        for name, p in theirs.items():
            p.grad = params[name].grad.nan_to_num(0.0) if name != "frozen" else None
        plain.step()
    for name, where in inside.items():
        assert torch.equal(params[name][where], theirs[name][where])


def refusals():
    params, bound = toy(torch.bfloat16)
    n = 48
    yield "other rows", dict(bound=selection(params, rows=((0, 8), (24, 32)))), r"rows: ranges \[\[0, 8\], \[24, 32\]\] there"
    yield "fewer", dict(bound=bind(*bound.params[:3])), "bias trains here and did not there"
    yield "more", dict(bound=bind(*bound.params, BoundParam("frozen", params["frozen"], 0, ((0, n),)))), "frozen trained there"
    yield "other axis", dict(bound=bind(BoundParam("rows", params["rows"], 1, ((0, 8), (16, 24))), *bound.params[1:])), "rows: dim 1"
    yield "master", dict(master="kahan"), "rows: master 'kahan' there, 'split' here"
    yield "moments", dict(moment_dtype=torch.bfloat16), "moment_dtype 'bfloat16' there, 'float32' here"


@pytest.mark.fault("Resume", "state of other rows, parameters, axes or precisions: refused by the difference, nothing changed")
@pytest.mark.parametrize("case, message", [(case, message) for _, case, message in refusals()],
                         ids=[name for name, _, _ in refusals()])
def test_state_of_another_selection_or_precision_is_refused_whole(case, message):
    there, bound = toy(torch.bfloat16)
    case = dict(case)
    other = case.pop("bound", bound)
    other = bind(*(BoundParam(p.name, there[p.name], p.dim, p.ranges) for p in other.params))
    source = make(there, other, **case)
    run(there, source, other, 1)
    params, bound = toy(torch.bfloat16)
    optimizer = make(params, bound, lr=0.5)
    run(params, optimizer, bound, 1)
    assert_refused(optimizer, source.state_dict(), message)


@pytest.mark.fault("Bad input", "state dicts with an entry missing or of the wrong kind: refused by name, nothing changed")
@pytest.mark.parametrize("spoil, message", [
    (lambda s: s["state"][0].pop("exp_avg"), "rows: the saved state has no exp_avg"),
    (lambda s: s["state"][3].update(exp_avg_sq=torch.zeros(5)), r"bias: the saved exp_avg_sq has shape \[5\]"),
    (lambda s: s["state"][3].update(master_lo=torch.zeros(16)), "bias: the saved master_lo is torch.float32"),
    (lambda s: s["state"][2].update(step=torch.tensor(float("nan"))), "all: the saved step is nan"),
    (lambda s: s["state"][2].update(step=torch.tensor([1.0, 2.0])), "all: the saved step is"),
    (lambda s: s["state"][2].update(step="three"), "all: the saved state has no step"),
    (lambda s: s["alps"].update(format="other"), "is not HeadAdamW's"),
    (lambda s: s["alps"].update(version=2), "version 2"),
    (lambda s: s["alps"].update(params=[1]), "has no parameters"),
    (lambda s: s["alps"].update(seed="x"), "the saved seed is 'x'"),
    (lambda s: s["alps"]["params"][0].update(spans=[[0, 8], [16, 99]]), "rows: spans"),
    (lambda s: s["alps"]["params"][0].update(spans="all"), "rows: spans"),
    (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
    (lambda s: s["param_groups"].append(dict(params=[])), "different number of parameter groups"),
    (lambda s: s.pop("param_groups"), "expected a state dict"),
])
def test_a_spoiled_state_dict_is_refused_whole(spoil, message):
    params, bound = toy(torch.bfloat16)
    optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    assert_refused(optimizer, saved, message)


def assert_refused(optimizer, saved, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["alps"] == before["alps"]
    for index, entry in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in entry.items())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_load_hooks_of_users_see_the_whole_state_dict():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: seen.append(len(saved["state"])))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [4, 4]


GROWN = dict(rows=((4, 20), (30, 32)), cols=((4, 19),), bias=((0, 48),))


@pytest.mark.parametrize("dtype, master, moments", [PRECISIONS[0], PRECISIONS[2]], ids=str)
def test_reselection_keeps_what_stays_and_starts_afresh_what_joins(dtype, master, moments):
    """Every element moves as under a torch-like run that began when it joined."""
    params, bound = toy(dtype)
    optimizer = make(params, bound, master=master, moment_dtype=moments)
    run(params, optimizer, bound, 4)
    middle = snapshot(params)
    grown = selection(params, **GROWN)
    stayed, fresh = copy.deepcopy((params, optimizer)), toy(dtype)[0]
    for name, p in fresh.items():
        p.data.copy_(middle[name])
    optimizer.set_heads(grown)
    run(params, optimizer, grown, 4, seed=3)
    assert_frozen(params, middle, grown)

    # the same gradients, on a run that kept the old selection and on one that began with the new
    run(stayed[0], stayed[1], stayed[1].heads, 4, seed=3)
    fresh_bound = selection(fresh, **GROWN)
    run(fresh, make(fresh, fresh_bound, master=master, moment_dtype=moments), fresh_bound, 4, seed=3)
    old, new = masks(params, bound), masks(params, grown)
    for name in params:
        kept, joined = old[name] & new[name], new[name] & ~old[name]
        assert same_bytes(params[name][kept], stayed[0][name][kept]), name
        assert same_bytes(params[name][joined], fresh[name][joined]), name
    assert optimizer.state[params["rows"]]["step"].tolist() == [8, 4, 8, 4]  # 4:8 8:16 16:20 and 30:32


def test_reselection_shrinks_to_nothing_and_whole_parameters_come_and_go():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 2)
    whole = selection(params, rows=((0, 48),), cols=((0, 24),), bias=((8, 24),))
    optimizer.set_heads(whole)
    run(params, optimizer, whole, 2)
    assert optimizer.state[params["rows"]]["exp_avg"].shape == (48, 24)
    assert optimizer.dense_state_dict()["state"][0]["step"] == 4
    optimizer.set_heads(bound)
    assert optimizer.state[params["rows"]]["step"].shape == () and optimizer.state[params["rows"]]["step"] == 4
    before = snapshot(params)
    optimizer.set_heads(bind())
    assert not optimizer.state
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_of_mixed_ages_resumes_bit_equal(dtype):
    params, bound = toy(dtype)
    optimizer = make(params, bound)
    run(params, optimizer, bound, 2)
    grown = selection(params, **GROWN)
    optimizer.set_heads(grown)
    run(params, optimizer, grown, 2)
    again, _ = toy(dtype)
    for name, p in again.items():
        p.data.copy_(params[name])
    other = make(again, selection(again, **GROWN))
    other.load_state_dict(through_file(optimizer.state_dict()))
    run(params, optimizer, grown, 2, seed=6)
    run(again, other, other.heads, 2, seed=6)
    assert all(same_bytes(again[name], params[name]) for name in params)


def test_a_refused_reselection_changes_nothing():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 2)
    across = bind(*bound.params[1:], BoundParam("rows", params["rows"], 1, ((0, 8),)))
    alien = bind(BoundParam("alien", nn.Parameter(torch.zeros(4)), 0, ((0, 2),)))
    for other, message in ((across, "rows was cut along dimension 0"), (alien, "alien holds selected slices")):
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizer.set_heads(other)
        assert optimizer.heads is bound and optimizer.state_dict()["alps"] == before["alps"]
        assert set(optimizer.state_dict()["state"]) == set(before["state"])
