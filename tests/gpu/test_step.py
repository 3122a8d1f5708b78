"""What only a GPU can show: kernels against the CPU backend, streams, graphs, huge tensors, frozen bytes.

Skipped without CUDA. The tests with `sanitizer` in their name are small: compute-sanitizer runs them.
"""

import copy
import time

import pytest
import torch
from torch import nn

from alps_kernels import HeadAdamW
from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from alps_kernels.selection import BoundParam, BoundSelection
from alps_kernels.selection.binding import SelectionCount
from tests.ops.delta_oracle import projection_oracle, stored_oracle
from tests.optim.cases import sliced_module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def bound_to(*parts):
    """A selection of (parameter, dim, ranges)."""
    params = tuple(BoundParam(f"p{i}", p, dim, ranges) for i, (p, dim, ranges) in enumerate(parts))
    return BoundSelection(None, params, "frozen", SelectionCount({}, {}))


def make(dtype, device="cuda", seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(256, 192, generator=generator).to(device, dtype)),
              nn.Parameter(torch.randn(128, 256, generator=generator).to(device, dtype)),
              nn.Parameter(torch.randn(256, generator=generator).to(device, dtype)),
              nn.Parameter(torch.randn(65, 190, generator=generator).to(device, dtype))]
    # Rows, columns, a bias and columns at odd places: the last two cannot be read 16 bytes at a time.
    parts = ((params[0], 0, ((0, 64), (128, 192))), (params[1], 1, ((32, 64), (96, 160))), (params[2], 0, ((0, 63),)),
             (params[3], 1, ((5, 12), (70, 143))))
    return params, bound_to(*parts)


def set_grads(params, bound, step):
    """Gradients that are NaN outside the selection."""
    generator = torch.Generator().manual_seed(100 + step)
    for part in bound.params:
        grad = torch.full_like(part.param, torch.nan)
        for block in part.blocks(grad):
            block.copy_(torch.randn(block.shape, generator=generator))
        part.param.grad = grad


def outside(part, tensor):
    mask = torch.ones_like(tensor, dtype=torch.bool)
    for block in part.blocks(mask):
        block.fill_(False)
    return tensor[mask].view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("master", ["split", "kahan", "stochastic", None])
def test_steps_equal_the_cpu_backend_and_leave_the_rest_alone_sanitizer(dtype, master):
    if dtype == torch.float32 and master not in ("split", None):
        pytest.skip("masters are of 16-bit parameters")
    sides = {}
    for device in ("cuda", "cpu"):
        params, bound = make(dtype, device)
        before = [p.detach().clone() for p in params]
        optimizer = HeadAdamW(params, lr=1e-2, weight_decay=0.1, heads=bound, master=master)
        for step in range(5):
            set_grads(params, bound, step)
            optimizer.step()
        for part, old in zip(bound.params, before, strict=True):
            assert torch.equal(outside(part, part.param.detach()), outside(part, old))
        sides[device] = [p.detach().float().cpu() for p in params]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for ours, reference in zip(sides["cuda"], sides["cpu"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_8_bits_equal_the_cpu_backend_sanitizer(dtype):
    sides = {}
    for device in ("cuda", "cpu"):
        params, bound = make(dtype, device)
        before = [p.detach().clone() for p in params]
        optimizer = HeadAdamW(params, lr=1e-2, weight_decay=0.1, heads=bound, moment_dtype="8bit")
        for step in range(3):
            set_grads(params, bound, step)
            optimizer.step()
        for part, old in zip(bound.params, before, strict=True):
            assert torch.equal(outside(part, part.param.detach()), outside(part, old))
        sides[device] = [(p.detach().float().cpu(), *(optimizer.state[p][k].int().cpu() for k in ("exp_avg", "exp_avg_sq")))
                         for p in params]
    for ours, reference in zip(sides["cuda"], sides["cpu"], strict=True):
        torch.testing.assert_close(ours[0], reference[0], rtol=1.6e-2, atol=2e-3)
        for codes, expected in zip(ours[1:], reference[1:], strict=True):  # a root on two sides of a tie: one code
            gap = (codes - expected).abs()
            assert gap.max() <= 1 and (gap > 0).double().mean() < 0.02


@pytest.mark.parametrize("dim, ranges", [(0, ((0, 64), (128, 192))), (1, ((32, 64), (96, 160)))])
@pytest.mark.parametrize("moments", [torch.float32, "8bit"], ids=str)
def test_a_leaf_writes_its_weight_in_the_same_launch_sanitizer(dim, ranges, moments):
    weight = torch.randn(256, 192).to("cuda", torch.bfloat16)
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


def test_the_host_needs_little_time_for_a_warm_step():
    """128 tensors; the issue's bound is 30 us, this one leaves room for a slow host."""
    params = [nn.Parameter(torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)) for _ in range(128)]
    optimizer = HeadAdamW(params, heads=bound_to(*((p, i % 2, ((8, 24),)) for i, p in enumerate(params))))
    for p in params:
        p.grad = torch.ones_like(p)
    times = []
    for _ in range(200):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    print(f"host time of a warm step of 128 tensors: {1e6 * min(times):.1f} us")
    assert min(times) < 100e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_16_bits_amsgrad_scaling_and_clipping_sanitizer(dtype):
    sides = {}
    for device in ("cuda", "cpu"):
        params, bound = make(dtype, device)
        optimizer = HeadAdamW(params, lr=1e-2, heads=bound, amsgrad=True, moment_dtype=torch.bfloat16, max_grad_norm=0.5)
        norms = []
        for step in range(4):
            set_grads(params, bound, step)
            optimizer.grad_scale = torch.tensor(256.0, device=device)
            optimizer.found_inf = torch.tensor(float(step == 2), device=device)
            optimizer.step()
            norms.append(optimizer.grad_norm.item())
        assert all(state["step"].item() == 3 for state in optimizer.state.values())
        sides[device] = [p.detach().float().cpu() for p in params], norms
    assert sides["cuda"][1] == pytest.approx(sides["cpu"][1], rel=1e-5)
    for ours, reference in zip(sides["cuda"][0], sides["cpu"][0], strict=True):
        # A moment that falls on the other side of a random threshold is 1 / 128 off.
        torch.testing.assert_close(ours, reference, rtol=1.6e-2, atol=1e-3)


def test_a_run_that_was_saved_goes_on_to_the_bit():
    params, bound = make(torch.bfloat16)
    optimizer = HeadAdamW(params, lr=1e-3, heads=bound, moment_dtype=torch.bfloat16)
    for step in range(3):
        set_grads(params, bound, step)
        optimizer.step()
    again = [nn.Parameter(p.detach().clone()) for p in params]
    again_bound = bound_to(*((p, part.dim, part.ranges) for p, part in zip(again, bound.params, strict=True)))
    other = HeadAdamW(again, lr=1e-3, heads=again_bound, moment_dtype=torch.bfloat16)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        for members, parts, resumed in ((params, bound, optimizer), (again, again_bound, other)):
            set_grads(members, parts, step)
            resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_the_oracle_sanitizer(dtype):
    group = (0, 0, 1, 1)
    layer = []
    for seed, (n, index) in enumerate(((4, (0, 1, 2, 3)), (2, group), (2, group))):
        base = (0.05 * torch.randn(n, 64, 96, generator=torch.Generator().manual_seed(seed))).to(dtype)
        task = (base.float() + 1e-2 * torch.randn(base.shape, generator=torch.Generator().manual_seed(9 + seed))).to(dtype)
        layer.append((base, task, index))
    there = tuple(Segment(b.cuda(), t.cuda(), i) for b, t, i in layer)
    here = tuple(Segment(*entry) for entry in layer)
    metrics = [m for m in METRICS if m != "cosine_weights"]
    for found, expected in ((head_delta([there], metrics), stored_oracle([here])),
                            (head_delta_projection([there], metrics), projection_oracle([here]))):
        for name in metrics:
            torch.testing.assert_close(found[name], expected[name], rtol=1.5e-5, atol=0, msg=name)


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_an_8b_model_score_as_the_cpu_backend_does(dtype, delta):
    generator = torch.Generator("cuda").manual_seed(0)
    layer = []
    for n, index in ((4, (0, 1, 2, 3)), (1, (0,) * 4), (1, (0,) * 4)):
        base = (0.02 * torch.randn(n, 128, 4096, generator=generator, device="cuda")).to(dtype)
        task = (base.float() + delta * torch.randn(base.shape, generator=generator, device="cuda")).to(dtype)
        layer.append(Segment(base, task, index))
    metrics = [m for m in METRICS if m not in ("pad_values", "cosine_weights")]
    for score in (head_delta, head_delta_projection):
        found = score([tuple(layer)], metrics)
        # float64 weights go to the CPU backend, which then computes in float64 throughout.
        wide = tuple(Segment(s.base.double(), s.task.double(), s.index) for s in layer)
        for name, expected in score([wide], metrics).items():
            torch.testing.assert_close(found[name], expected, rtol=1.5e-5, atol=0, msg=f"{score.__name__} {name}")


def test_scores_are_equal_to_the_bit_from_run_to_run():
    base = 0.02 * torch.randn(32, 128, 4096, device="cuda")
    layer = [Segment(base.bfloat16(), (base + 1e-3 * torch.randn_like(base)).bfloat16(), tuple(range(32)))]
    metrics = [m for m in METRICS if m != "pad_values"]
    first, second = head_delta([layer], metrics), head_delta([layer], metrics)
    assert all(torch.equal(first[name], second[name]) for name in metrics)


def test_a_second_stream():
    params, bound = make(torch.float32)
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    twin_bound = bound_to(*((t, part.dim, part.ranges) for t, part in zip(twin, bound.params, strict=True)))
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
    assert all(torch.equal(a, b) for a, b in zip(params, twin, strict=True))


def test_a_graph_replays_with_a_changing_lr():
    params, bound = make(torch.float32)
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    twin_bound = bound_to(*((t, part.dim, part.ranges) for t, part in zip(twin, bound.params, strict=True)))
    lr = torch.tensor(1e-2, device="cuda")
    ours = HeadAdamW(params, lr=lr, heads=bound, capturable=True)
    other = HeadAdamW(twin, lr=torch.tensor(1e-2, device="cuda"), heads=twin_bound, capturable=True)
    set_grads(params, bound, 0)
    set_grads(twin, twin_bound, 0)
    for _ in range(3):
        ours.step()
        other.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(5):
        for group in (ours.param_groups[0], other.param_groups[0]):
            group["lr"].fill_(1e-2 / (step + 1))
        graph.replay()
        other.step()
    for a, b in zip(params, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_two_to_the_31_elements(dim):
    rows = 2**31 // 4096 + 16
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB")
    param = nn.Parameter(torch.zeros(rows, 4096, dtype=torch.bfloat16, device="cuda"))
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
    model = nn.Linear(64, 64, bias=False).cuda()
    plain = copy.deepcopy(model)
    x = torch.randn(8, 64, device="cuda")

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
