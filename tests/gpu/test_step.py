"""Steps that only a GPU can show: kernels against the CPU backend, huge tensors, frozen bytes, compiled code.

Skipped without CUDA; see cases.py. The tests with `sanitizer` in their name are small: compute-sanitizer runs them.
"""

import copy

import pytest
import torch
from torch import nn

from alps_kernels import HeadAdamW
from tests.gpu import cases
from tests.gpu.cases import bound_to, copies, make, outside, set_grads, twin_of
from tests.optim.cases import sliced_module

pytestmark = cases.MARKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", ["split", "kahan", "stochastic", None])
def test_steps_equal_the_cpu_backend_and_leave_the_rest_alone_sanitizer(dtype, master):
    if dtype == torch.float32 and master not in ("split", None):
        pytest.skip("masters are of 16-bit parameters")
    sides = {}
    for side, device in (("gpu", cases.DEVICE), ("cpu", "cpu")):
        params, bound = make(dtype, device)
        before = copies(params)
        optimizer = HeadAdamW(params, lr=1e-2, weight_decay=0.1, heads=bound, master=master)
        for step in range(5):
            set_grads(params, bound, step)
            optimizer.step()
        for part, old in zip(bound.params, before, strict=True):
            assert torch.equal(outside(part, part.param.detach()), outside(part, old))
        sides[side] = [p.detach().float().cpu() for p in params]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for ours, reference in zip(sides["gpu"], sides["cpu"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dim, ranges", [(0, ((0, 64), (128, 192))), (1, ((32, 64), (96, 160)))])
@pytest.mark.parametrize("moments", [torch.float32, "8bit"], ids=str)
def test_a_leaf_writes_its_weight_in_the_same_launch_sanitizer(dim, ranges, moments):
    weight = torch.randn(256, 192).to(cases.DEVICE, torch.bfloat16)
    module, whole = sliced_module(weight.clone(), dim, ranges), nn.Parameter(weight.clone())
    leaf = module.weight_slice
    ours = HeadAdamW([leaf], lr=1e-2, moment_dtype=moments)
    plain = HeadAdamW([whole], lr=1e-2, moment_dtype=moments, heads=bound_to((whole, dim, ranges)))
    for _ in range(3):
        whole.grad = torch.randn_like(whole)
        leaf.grad = module.synced.cut(whole.grad)
        ours.step()
        plain.step()
    assert torch.equal(module.weight, whole) and torch.equal(leaf, module.synced.cut(whole))
    assert not module.synced.stale(module.weight, leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_16_bits_amsgrad_scaling_and_clipping_sanitizer(dtype):
    sides = {}
    for side, device in (("gpu", cases.DEVICE), ("cpu", "cpu")):
        params, bound = make(dtype, device)
        optimizer = HeadAdamW(params, lr=1e-2, heads=bound, amsgrad=True, moment_dtype=torch.bfloat16,
                              max_grad_norm=0.5)
        norms = []
        for step in range(4):
            set_grads(params, bound, step)
            optimizer.grad_scale = torch.tensor(256.0, device=device)
            optimizer.found_inf = torch.tensor(float(step == 2), device=device)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
        assert all(state["step"].item() == 3 for state in optimizer.state.values())
        sides[side] = [p.detach().float().cpu() for p in params], norms
    assert sides["gpu"][1] == pytest.approx(sides["cpu"][1], rel=1e-5)
    for ours, reference in zip(sides["gpu"][0], sides["cpu"][0], strict=True):
        # A moment that falls on the other side of a random threshold is 1 / 128 off.
        torch.testing.assert_close(ours, reference, rtol=1.6e-2, atol=1e-3)


@pytest.mark.parametrize("moments", [torch.bfloat16, "8bit"], ids=str)
def test_a_run_that_was_saved_goes_on_to_the_bit(moments):
    params, bound = make(torch.bfloat16)
    optimizer = HeadAdamW(params, lr=1e-3, heads=bound, moment_dtype=moments)
    for step in range(3):
        set_grads(params, bound, step)
        optimizer.step()
    again, again_bound = twin_of(params, bound)
    other = HeadAdamW(again, lr=1e-3, heads=again_bound, moment_dtype=moments)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for members, parts, resumed in ((params, bound, optimizer), (again, again_bound, other)):
            set_grads(members, parts, step)
            resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_two_to_the_31_elements(dim):
    rows = 2**31 // 4096 + 16
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    param = nn.Parameter(torch.zeros(rows, 4096, dtype=torch.bfloat16, device=cases.DEVICE))
    param.grad = torch.ones_like(param)
    size = param.shape[dim]
    optimizer = HeadAdamW([param], lr=1.0, weight_decay=0.0, heads=bound_to((param, dim, ((size - 8, size),))))
    optimizer.step()
    rest, moved = param.detach().split([size - 8, 8], dim)
    assert (moved == -1).all() and not rest.any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_the_training_step_compiles(backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Linear(64, 64, bias=False).to(cases.DEVICE)
    plain = copy.deepcopy(model)
    x = torch.randn(8, 64, device=cases.DEVICE)

    def train(model, optimizer):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = HeadAdamW(model.parameters(), heads=bound_to((model.weight, 0, ((0, 16),))))
    other = HeadAdamW(plain.parameters(), heads=bound_to((plain.weight, 0, ((0, 16),))))
    compiled = torch.compile(train, backend=backend)
    for _ in range(3):
        compiled(model, ours)
        train(plain, other)
    torch.testing.assert_close(model.weight, plain.weight, rtol=1e-5, atol=1e-5)  # lr is 1e-3
    assert torch.equal(model.weight[16:], plain.weight[16:])
