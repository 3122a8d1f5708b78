"""What trains models in practice works on leaves: checkpointing, compilers, scalers, optimizers.

Replicas and shards: test_sharded_slices.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import alps_kernels as alps
from alps_kernels.tensors import synced_slices_in

from .cases import batch, cut_grads, grads, loss_of, pair
from .toy import toy


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model_type, reentrant):
    plain, heads, sliced, bound = pair(model_type, torch.float64)
    for model in (plain, sliced):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    loss_of(plain).backward()
    enable = getattr(sliced, "activation_checkpointing_enable", sliced.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    if getattr(sliced, "_require_grads_hooks", None) or hasattr(sliced, "_require_grads_hook"):
        sliced.disable_input_require_grads()
    if reentrant:
        with pytest.raises(RuntimeError, match="use_reentrant=False, or model.enable_input_require_grads"):
            loss_of(sliced)
        sliced.enable_input_require_grads()
    loss_of(sliced).backward()
    for name, want in cut_grads(plain, heads).items():
        torch.testing.assert_close(grads(bound)[name], want, rtol=1e-9, atol=1e-13)


def test_reentrant_checkpointing_by_hand():
    plain, selection, model = toy()
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(5, 10, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing gives the heads in here no gradient"):
        checkpoint(model, x, use_reentrant=True)
    assert torch.equal(checkpoint(model.eval(), x, use_reentrant=True), plain(x))
    with torch.no_grad():
        assert torch.equal(model.train()(x), plain(x))
    checkpoint(model, x.requires_grad_(), use_reentrant=True).sum().backward()
    assert all(part.param.grad is not None for part in bound.params)


def compiled(model, backend):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.fixture
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.mark.parametrize("model_type, backend", [
    ("qwen2", "aot_eager"), ("gpt2", "aot_eager"), pytest.param("qwen2", "inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training(model_type, backend, no_recompilation):
    dtype = torch.float32 if backend == "inductor" else torch.float64
    _, heads, model, bound = pair(model_type, dtype)
    other = copy.deepcopy(model)
    fast = compiled(other, backend)
    # by hand and through `.data`, as nothing would notice; then by an optimizer
    for step in range(3):
        losses = []
        for run, owner in ((model, model), (fast, other)):
            loss = run(**{k: v for k, v in batch(model, step).items() if k != "labels"}).logits.square().mean()
            loss.backward()
            for part in heads.bind(owner).params:
                if step == 0:
                    part.param.data -= 0.3 * part.param.grad
            if step:
                torch.optim.SGD([p.param for p in heads.bind(owner).params], 0.3).step()
            owner.zero_grad()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    for part, theirs in zip(bound.params, heads.bind(other).params, strict=True):
        torch.testing.assert_close(theirs.param, part.param, rtol=1e-5, atol=1e-7)
    assert torch.equal(loss_of(other, 5), loss_of(copy.deepcopy(other), 5))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_eager_code_beside_compiled_code_sees_its_steps(backend):
    """The compiled backward leaves no trace on the synced, and a step by hand none on the leaf."""
    _, selection, model = toy()
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(5, 10, dtype=torch.float64)
    model(x)
    compiled(model, backend)(x).square().sum().backward()
    for part in bound.params:
        part.param.data -= 0.1 * part.param.grad
        part.param.grad = None
    plain = alps.unslice_heads(copy.deepcopy(model))
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_backward_uses_the_leaf_where_the_weight_was_filled_anew(backend):
    """FSDP2 refills the weight between forward and backward, with values that no step has reached."""
    plain, selection, model = toy(parts=("q", "o"))
    bound = alps.slice_heads(model, selection, layout=model.layout())
    old = {name: synced.weight.detach().clone() for name, synced in synced_slices_in(model)}
    for part in bound.params:
        part.param.data.add_(0.1)
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    out = compiled(nn.Sequential(model.q, model.o), backend)(x)
    for name, synced in synced_slices_in(model):
        synced.weight.data.copy_(old[name])
    out.square().sum().backward()
    for name, synced in synced_slices_in(model):
        for block, part in synced.pairs(plain.get_parameter(name), synced.leaf):
            block.data.copy_(part)
    y = x.detach().requires_grad_()
    plain.o(plain.q(y)).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_compiler_copies_no_whole_weight():
    """Written as plain slice assignments, the leaf would cost a copy of the weight in every forward."""
    from torch._inductor.utils import run_and_get_code

    _, selection, model = toy(parts=("q", "o"), dtype=torch.float32)
    alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(5, 10, requires_grad=True)
    torch._dynamo.reset()
    _, codes = run_and_get_code(torch.compile(nn.Sequential(model.q, model.o), fullgraph=True), x)
    assert sum(code.count("write_slices.default(") for code in codes) == 3  # two weights and q's bias
    assert not any("slice_scatter" in code or "as_strided" in code for code in codes)


def test_a_grad_scaler_scales_steps_and_skips_infinities():
    plain, heads, sliced, bound = pair(dtype=torch.float64)
    optimizer = torch.optim.AdamW([part.param for part in bound.params], 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [part.param.detach().clone() for part in bound.params]
    scaler.scale(loss_of(sliced)).backward()
    bound.params[0].param.grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0 and all(torch.equal(a, p.param) for a, p in zip(before, bound.params, strict=True))
    optimizer.zero_grad()
    scaler.scale(loss_of(sliced)).backward()
    scaler.unscale_(optimizer)
    loss_of(plain).backward()
    for name, want in cut_grads(plain, heads).items():
        torch.testing.assert_close(grads(bound)[name], want)
    scaler.step(optimizer)
    assert not any(torch.equal(a, p.param) for a, p in zip(before, bound.params, strict=True))


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, 0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_leaves_as_it_trains_parameters_of_that_size(name):
    """Beside: the same leaves written into a plain model's weights by index, differentiably."""
    plain, heads, sliced, bound = pair(dtype=torch.float64)
    values = {part.name: part.param.detach().clone().requires_grad_() for part in bound.params}
    leaves = {name + "_slice": (name, synced) for name, synced in synced_slices_in(sliced)}

    def by_index(seed):
        whole = {}
        for name, value in values.items():
            if name not in leaves:
                whole[name] = value
                continue
            full, synced = leaves[name]
            index = torch.cat([torch.arange(a, b) for a, b in synced.ranges])
            whole[full] = plain.get_parameter(full).detach().index_copy(synced.dim, index, value)
        return torch.func.functional_call(plain, whole, (), batch(plain, seed)).loss

    ours, theirs = (OPTIMIZERS[name](list(params)) for params in ([p.param for p in bound.params], values.values()))
    for step in range(3):
        for optimizer, loss in ((ours, lambda s=step: loss_of(sliced, s)), (theirs, lambda s=step: by_index(s))):
            def closure(optimizer=optimizer, loss=loss):
                optimizer.zero_grad()
                value = loss()
                value.backward()
                return value

            optimizer.step(closure)
    for part in bound.params:
        torch.testing.assert_close(part.param, values[part.name], rtol=1e-7, atol=1e-10)
    assert heads


def test_transforms_of_torch_func():
    """Gradients of every sample apart, a Jacobian-vector product and a Hessian's row, through the leaves."""
    _, selection, model = toy(kv="any")
    bound = alps.slice_heads(model, selection, layout=model.layout())
    names = [part.name for part in bound.params if part.name.endswith("_slice")]
    values = {name: model.get_parameter(name).detach().clone() for name in names}
    x = torch.randn(4, 3, 10, dtype=torch.float64)

    def loss(leaves, sample):
        return torch.func.functional_call(model, leaves, (sample,)).square().sum()

    apart = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample).square().sum().backward()
        for name in names:
            torch.testing.assert_close(apart[name][i], model.get_parameter(name).grad)
    direction = {name: torch.ones_like(value) for name, value in values.items()}
    _, along = torch.func.jvp(lambda leaves: loss(leaves, x[0]), (values,), (direction,))
    torch.testing.assert_close(along, sum(apart[name][0].sum() for name in names))
    curved = torch.func.grad(lambda leaves: sum(g.sum() for g in torch.func.grad(loss)(leaves, x[0]).values()))(values)
    step = {name: value + 1e-6 for name, value in values.items()}
    moved = torch.func.grad(loss)(step, x[0])
    for name in names:
        torch.testing.assert_close((moved[name] - apart[name][0]) / 1e-6, curved[name], rtol=1e-4, atol=1e-4)
