"""Streams, memory that is freed early, version counters, the default device. Skipped without CUDA; see cases.py."""

import gc

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels import HeadAdamW
from tests.gpu import cases
from tests.gpu.cases import bound_to, copies, equal, make, set_grads, twin_of
from tests.optim.cases import sliced_module
from tests.slicing.cases import tiny

pytestmark = cases.MARKS


def test_a_second_stream():
    params, bound = make(torch.float32)
    twin, twin_bound = twin_of(params, bound)
    ours, other = HeadAdamW(params, heads=bound), HeadAdamW(twin, heads=twin_bound)
    stream = torch.cuda.Stream()
    for step in range(20):
        set_grads(params, bound, step)
        set_grads(twin, twin_bound, step)
        ours.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            other.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert equal(params, twin)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"capturable": True}], ids=str)
def test_tables_outlive_an_optimizer_whose_kernel_another_stream_has_yet_to_run(options):
    """The optimizer is dropped while its kernel waits; its stream then writes into all memory that became free."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    for turn in range(6):
        home, away = streams[turn % 2], streams[1 - turn % 2]
        params, bound = make(torch.float32, seed=turn)
        twin, twin_bound = twin_of(params, bound)
        ours, other = HeadAdamW(params, heads=bound, **options), HeadAdamW(twin, heads=twin_bound, **options)
        for step in range(2):
            set_grads(twin, twin_bound, step)
            other.step()
        set_grads(params, bound, 0)
        torch.cuda.synchronize()
        with torch.cuda.stream(home):
            ours.step()  # tables and state are of this stream
            set_grads(params, bound, 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(away):
            torch.cuda._sleep(40_000_000)  # some 20 ms: the kernel starts when the memory below was written
            ours.step()
        state = [dict(ours.state[p]) for p in params]  # whoever drops the optimizer keeps what is the user's
        del ours
        gc.collect()
        with torch.cuda.stream(home):
            rubbish = [torch.full((2**k,), -1, dtype=torch.int64, device=cases.DEVICE)
                       for k in range(4, 17) for _ in range(16)]
        torch.cuda.synchronize()
        assert equal(params, twin), turn
        del state, rubbish


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"moment_dtype": "8bit"}, {"master": "kahan"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_raises_the_version_of_what_it_writes_and_of_nothing_else(dtype, options):
    params, bound = make(dtype)
    frozen = nn.Parameter(torch.randn(8, 8, device=cases.DEVICE).to(dtype))
    optimizer = HeadAdamW([*params, frozen], heads=bound, **options)
    frozen.grad = torch.ones_like(frozen)
    for step in range(3):  # the later ones take the direct way to the launch
        set_grads(params, bound, step)
        before, still = [p._version for p in params], (frozen._version, [p.grad._version for p in params])
        optimizer.step()
        assert all(p._version > old for p, old in zip(params, before, strict=True)), step
        assert still == (frozen._version, [p.grad._version for p in params])


def test_a_backward_pass_over_weights_that_a_step_changed_is_refused():
    params, bound = make(torch.float32)
    optimizer = HeadAdamW(params, heads=bound)
    set_grads(params, bound, 0)
    optimizer.step()
    loss = (params[0] ** 2).sum()  # saves the weight
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_of_a_leaf_raises_the_version_of_its_full_weight():
    module = sliced_module(torch.randn(256, 192).to(cases.DEVICE, torch.bfloat16), 0, ((0, 64), (128, 192)))
    leaf = module.weight_slice
    optimizer = HeadAdamW([leaf], lr=1e-2)
    for _ in range(2):
        leaf.grad = torch.randn_like(leaf)
        before = leaf._version, module.weight._version
        optimizer.step()
        assert leaf._version > before[0] and module.weight._version > before[1]
        assert not module.synced.stale(module.weight, leaf)  # a step's own writes are no reason to copy again


@pytest.fixture
def default_device():
    torch.set_default_device(cases.DEVICE)
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"capturable": True}, {"moment_dtype": "8bit"},
                                     {"capturable": True, "max_grad_norm": 0.5}, {"amsgrad": True}], ids=str)
def test_steps_with_a_default_device_are_those_without(options, default_device):
    results = []
    for device in (cases.DEVICE, None):
        torch.set_default_device(device)
        params, bound = make(torch.bfloat16)
        optimizer = HeadAdamW(params, lr=1e-2, heads=bound, **options)
        for step in range(3):
            set_grads(params, bound, step)
            optimizer.step()
        again = HeadAdamW(params, lr=1e-2, heads=bound, **options)
        again.load_state_dict(optimizer.state_dict())
        set_grads(params, bound, 3)
        again.step()
        results.append(copies(params))
    assert equal(*results)


def test_a_step_without_gradients_with_a_default_device(default_device):
    params, bound = make(torch.float32)
    optimizer, before = HeadAdamW(params, heads=bound, max_grad_norm=1.0), copies(params)
    optimizer.step()
    assert equal(params, before)


@pytest.mark.parametrize("representation", ["projection", "qkv"])
def test_scores_with_a_default_device_are_those_without(representation, default_device):
    torch.set_default_device(None)
    base, task = (tiny("llama", seed=seed).to(cases.DEVICE) for seed in (0, 1))
    expected = alps.score_heads(base, task, representation=representation)
    torch.set_default_device(cases.DEVICE)
    assert torch.equal(alps.score_heads(base, task, representation=representation).tensor, expected.tensor)


def test_two_optimizers_over_parameters_of_a_frozen_rest_share_nothing():
    """Rebuilt in a loop, as sweeps do: each starts from nothing."""
    results = []
    for _ in range(3):
        params, bound = make(torch.float32)
        optimizer = HeadAdamW(params, lr=1e-2, heads=bound_to(*((p.param, p.dim, p.ranges) for p in bound.params)))
        for step in range(2):
            set_grads(params, bound, step)
            optimizer.step()
        results.append(copies(params))
        del optimizer
    assert equal(results[0], results[1]) and equal(results[0], results[2])
