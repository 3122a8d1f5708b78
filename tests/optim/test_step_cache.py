"""The warm step: what it costs the host, and that nothing that changed slips past its quick look."""

import copy
import inspect
import sys

import pytest
import torch
from torch import nn

from alps_kernels.ops.adamw import launch, plan
from alps_kernels.ops.device import device_code
from alps_kernels.optim import HeadAdamW, step_cache
from alps_kernels.optim.first_steps import FIRST_STEPS
from alps_kernels.optim.watched_state import ParamState
from alps_kernels.selection import BoundParam
from alps_kernels.tensors import synced_slices

from .cases import bind, fill_grads, make, same_bytes, selection, sliced_module, snapshot, toy


class Launched:
    """Stands for a CompiledKernel: keeps what it was launched with."""

    packed_metadata = None

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.seen.append((grid, args))


class Kernel:
    """Stands for a JIT function: counts what goes through its dispatch."""

    def __init__(self):
        self.dispatched, self.seen = [], []

    def __getitem__(self, grid):
        def run(*tensors, num_warps, enable_fp_fusion, maxnreg=0, **constants):
            assert enable_fp_fusion is False
            self.dispatched.append((grid, (*tensors, *constants.values()), list(constants)))
            return Launched(self)

        return run


@pytest.fixture
def kernel(monkeypatch):
    code = type("Code", (), {"head_adamw_kernel": Kernel(), "head_grad_norm_kernel": Kernel()})
    monkeypatch.setattr(plan, "device_code", lambda name: code)
    monkeypatch.setattr(synced_slices, "_BY_LEAF", {})  # sliced models of other tests, which each step looks for while they live
    return code.head_adamw_kernel


def many(n, steps=2):
    params = [nn.Parameter(torch.randn(32, 32).bfloat16()) for _ in range(n)]
    bound = bind(*(BoundParam(str(i), p, i % 2, ((8, 24),)) for i, p in enumerate(params)))
    optimizer = HeadAdamW(params, heads=bound)
    optimizer._backend = "triton"
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def calls(function):
    """Function calls, Python's and C's, that Python code makes."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(trace)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_warm_step_makes_as_many_calls_for_any_number_of_tensors(kernel):
    counted = []
    for n in (8, 128):
        params, optimizer = many(n, FIRST_STEPS + 2)  # the first ones are watched, see checks
        counted.append(calls(optimizer.step))
        held = [p.grad for p in params]  # and so with fresh gradients in other places
        for p in params:
            p.grad = p.grad.clone()
        counted.append(calls(optimizer.step))
        del held
    same, moved = counted[2:]
    assert counted[:2] == counted[2:] and same <= 140 and moved <= 160, counted


def test_launches_go_past_dispatch_from_the_second_on(kernel):
    _, optimizer = many(4)
    assert len(kernel.dispatched) == 1 and len(kernel.seen) == 1
    grid, args, names = kernel.dispatched[0]
    assert kernel.seen[0][0] == grid and len(grid) == 3
    assert kernel.seen[0][1][0] is args[0]  # the work list
    assert kernel.seen[0][1][6:] == args[6:]
    # the binary takes every argument in the kernel's order, constants too
    real = device_code("head_adamw").head_adamw_kernel
    assert ["tiles_ptr", "pointers_ptr", "hypers_ptr", "norm_ptr", "scale_ptr", "found_inf_ptr", "max_norm", *names] == list(real.arg_names)
    optimizer.max_grad_norm = 1.0  # the norm is then a tensor: another binary
    optimizer.step()
    assert len(kernel.dispatched) == 2
    optimizer.step()
    assert len(kernel.dispatched) == 2


def test_under_another_triton_every_launch_is_dispatched(kernel, monkeypatch):
    monkeypatch.setattr(launch, "_binaries_are_known", lambda: False)
    _, optimizer = many(2)
    assert len(kernel.dispatched) == 2 and not kernel.seen


def test_addresses_and_hyperparameters_arrive(kernel):
    params, optimizer = many(5)
    optimizer.param_groups[0]["lr"] = 0.5
    for p in params:
        p.grad = p.grad.clone()
    grads = [p.grad.data_ptr() for p in params]
    optimizer.step()
    _, (_, pointers, hypers, *_) = kernel.seen[-1]
    assert pointers[:, 0].tolist() == [p.data_ptr() for p in params] and pointers[:, 1].tolist() == grads
    assert hypers[0, 6].item() == pytest.approx(0.5 / (1 - 0.9**3)) and hypers[0, 8] == 3
    assert optimizer.state[params[0]]["step"] == 3


def test_binaries_of_installed_triton_have_what_the_fast_launch_takes():
    from triton.compiler import CompiledKernel

    assert "__getitem__" in vars(CompiledKernel)
    assert "self.run(grid[0], grid[1], grid[2], stream" in inspect.getsource(CompiledKernel.__getitem__)


CHANGES = {
    "a group replaced by another dict": lambda p, o: o.param_groups.__setitem__(0, {**o.param_groups[0], "lr": 0.5}),
    "a whole number for a step count": lambda p, o: o.state[p["rows"]].update(step=torch.tensor(50)),
    "a step count written in place": lambda p, o: o.state[p["rows"]]["step"].fill_(50),
    "a step count replaced": lambda p, o: o.state[p["rows"]].update(step=torch.tensor(50.0)),
    "a moment replaced": lambda p, o: o.state[p["all"]].update(exp_avg=o.state[p["all"]]["exp_avg"] * 3),
    "a state replaced by a plain dict": lambda p, o: o.state.update(
        {p["all"]: {k: v * 2 for k, v in o.state[p["all"]].items()}}),
    "a state lost": lambda p, o: o.state.pop(p["rows"]),
    "all states replaced": lambda p, o: setattr(o, "state", type(o.state).of({
        k: {n: v * 2 for n, v in s.items()} for k, s in o.state.items()})),
    "all states lost": lambda p, o: o.state.clear(),
    "weights elsewhere": lambda p, o: setattr(p["cols"], "data", p["cols"].data.clone() * 2),
    "a gradient of other strides": lambda p, o: setattr(p["all"], "grad", p["all"].grad.t().contiguous().t()),
    "a gradient gone": lambda p, o: setattr(p["rows"], "grad", None),
    "another lr": lambda p, o: o.param_groups[0].update(lr=0.5),
    "a parameter taken out of its group": lambda p, o: o.param_groups[0]["params"].pop(3),
    "amsgrad off": lambda p, o: o.param_groups[0].update(amsgrad=False),
}


def stays_warm(optimizer):
    kept = optimizer._cache
    return kept.hold(optimizer.param_groups, optimizer.state) is not None


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    """Beside an optimizer that keeps nothing from step to step."""
    results = []
    for fresh in (False, True):
        params, bound = toy()
        optimizer = make(params, bound, amsgrad=name == "amsgrad off")
        for step in range(5):
            fill_grads(params, bound, torch.Generator().manual_seed(step))
            if step == 3:
                CHANGES[name](params, optimizer)
                assert fresh or stays_warm(optimizer) == (name == "another lr")
            if fresh:
                optimizer._cache = None
                optimizer._launches = optimizer._launches.for_others()
            elif step == 2:
                assert stays_warm(optimizer)
            optimizer.step()
        results.append((snapshot(params), {p: dict(s) for p, s in zip(range(9), optimizer.state.values(), strict=False)}))
    (a, s), (b, t) = results
    assert all(same_bytes(a[k], b[k]) for k in a)
    assert all(torch.equal(s[k][e], t[k][e]) for k in t for e in t[k])


@pytest.mark.parametrize("counts", ["plain", "capturable"])
def test_states_that_moved_are_followed(counts):
    """Optimizer states that go to the host and back through `.data`, as many loops move them."""
    ends = []
    for moves in (False, True):
        params, bound = toy()
        optimizer = make(params, bound, capturable=counts == "capturable")
        for step in range(6):
            fill_grads(params, bound, torch.Generator().manual_seed(step))
            if moves and step == 3:
                for state in optimizer.state.values():
                    for t in state.values():
                        t.data = t.data.clone()
            optimizer.step()
        assert all(state["step"] == 6 for state in optimizer.state.values())
        ends.append(params)
    assert all(same_bytes(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_gradient_that_appears_is_seen():
    params, bound = toy()
    optimizer = make(params, bound)
    for step in range(3):
        fill_grads(params, bound, torch.Generator().manual_seed(step))
        if step < 2:
            params["all"].grad = None
        optimizer.step()
    assert optimizer.state[params["all"]]["step"] == 1 and optimizer.state[params["rows"]]["step"] == 3


def test_a_sparse_gradient_and_one_of_another_dtype_are_refused_when_warm():
    params, bound = toy()
    optimizer = make(params, bound)
    for _ in range(3):
        fill_grads(params, bound, torch.Generator())
        optimizer.step()
    params["all"].grad = torch.zeros(48, 24).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients: that of all"):
        optimizer.step()


def test_a_copy_whose_weight_was_replaced_is_left_to_the_projection():
    module = sliced_module(torch.randn(16, 8), 0, ((2, 6),))
    leaf = module.weight_slice
    optimizer = HeadAdamW([leaf], lr=0.1)
    for step in range(4):
        leaf.grad = torch.ones_like(leaf)
        if step == 2:
            old = module.weight
            module.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.float64), requires_grad=False)
            before = old.detach().clone()
        optimizer.step()
    assert torch.equal(old, before) and not module.weight.any()


def test_without_torchs_guards_the_same_is_seen(monkeypatch):
    monkeypatch.setattr(step_cache, "TensorGuards", None)
    for name in ("a gradient of other strides", "a gradient gone", "weights elsewhere"):
        test_a_change_is_seen(name)


def test_states_in_files_and_copies_are_plain_and_watched_again():
    params, bound = toy()
    optimizer = make(params, bound)
    for _ in range(2):
        fill_grads(params, bound, torch.Generator())
        optimizer.step()
    assert all(type(s) is ParamState for s in optimizer.state.values())
    assert all(type(s) is dict for s in optimizer.state_dict()["state"].values())
    clones, other = copy.deepcopy((params, optimizer))
    fill_grads(clones, other.heads, torch.Generator())
    other.step()
    assert all(type(s) is ParamState for s in other.state.values())
    assert other.state[clones["rows"]]["step"] == 3 and optimizer.state[params["rows"]]["step"] == 2


def test_reselection_between_warm_steps_is_seen():
    params, bound = toy()
    optimizer = make(params, bound)
    for step in range(4):
        fill_grads(params, optimizer.heads, torch.Generator().manual_seed(step))
        if step == 2:
            optimizer.set_heads(selection(params, rows=((30, 40),)))
            fill_grads(params, optimizer.heads, torch.Generator().manual_seed(step))
        optimizer.step()
    assert optimizer.state[params["rows"]]["step"].item() == 2 and optimizer.state[params["all"]]["step"] == 4
