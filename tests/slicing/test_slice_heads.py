"""Sliced gradients are autograd's, cut; what trains through them is what training under a mask gives."""

import copy

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.slicing.projection import Sliced
from alps_kernels.tensors import synced_slices_in

from ..optim.cases import same_bytes
from .cases import MODELS, batch, cut_grads, grads, loss_of, pair, some_heads, tiny
from .toy import toy


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("o",), ("q", "k", "v", "o")], ids="".join)
@pytest.mark.parametrize("model_type", MODELS)
def test_gradients_are_the_full_ones_cut(model_type, parts):
    plain, heads, sliced, bound = pair(model_type, torch.float64, parts)
    assert any(isinstance(module, Sliced) for module in sliced.modules())
    out = [loss_of(model) for model in (plain, sliced)]
    assert torch.equal(*out)
    for loss in out:
        loss.backward()
    want, got = cut_grads(plain, heads), grads(bound)
    assert list(want) == list(got)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")
        assert want[name].any()
    others = {id(part.param) for part in bound.params}
    assert all(p.grad is None and not p.requires_grad for p in sliced.parameters() if id(p) not in others)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "phi3", "bert", "t5"])
def test_training_is_training_under_a_mask(model_type):
    # float64: a key's bias has no gradient but rounding, which Adam would blow up
    plain, heads, sliced, bound = pair(model_type, torch.float64)
    full = heads.freeze(plain)
    before = {name: param.detach().clone() for name, param in plain.named_parameters()}
    masked = alps.HeadAdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, heads=full)
    cut = torch.optim.AdamW([part.param for part in bound.params], lr=1e-2, weight_decay=0.1)
    for step in range(4):
        for model, optimizer in ((plain, masked), (sliced, cut)):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    inside = {part.name: part for part in full.params}
    for (name, a), (other, b) in zip(plain.state_dict().items(), sliced.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
        if name in inside:
            outside = torch.ones_like(b, dtype=torch.bool)
            for block in inside[name].blocks(outside):
                block.fill_(False)
            assert same_bytes(b[outside], before[name][outside]) and (b != before[name]).any()
        elif name in before:
            assert same_bytes(b, before[name]), name


def test_head_adamw_takes_the_leaves_by_the_same_line():
    plain, heads, sliced, bound = pair("qwen2", torch.float64)
    heads.freeze(plain)
    for model in (plain, sliced):
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=heads.bind(model))
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    for (name, a), b in zip(plain.state_dict().items(), sliced.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("shape", [(10,), (5, 10), (2, 3, 10), (2, 1, 3, 10), (0, 10), (2, 0, 10)], ids=str)
@pytest.mark.parametrize("heads", [((0, 1),), ((0, 0), (0, 2)), ((0, 0), (0, 2), (0, 3))], ids=str)
def test_every_shape_of_input(shape, heads):
    plain, selection, model = toy(heads, kv="any")
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(*shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    weight = torch.randn(shape, dtype=torch.float64)
    for module, value in zip((plain, model), inputs, strict=True):
        (module(value) * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    selection_of = {part.name: part for part in selection.bind(plain, layout=plain.layout()).params}
    for part in bound.params:
        full = selection_of[part.name.removesuffix("_slice")]
        want = torch.cat(full.blocks(full.param.grad), full.dim).reshape(part.param.shape)
        torch.testing.assert_close(part.param.grad, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    _, selection, model = toy(bias=bias, kv="any")
    bound = alps.slice_heads(model, selection, layout=model.layout())
    leaves = [part.param for part in bound.params]
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    # gradcheck moves its inputs through `.data`, without a gradient: it is told to copy each time
    for _, synced in synced_slices_in(model):
        synced.always = True
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *leaves))


def test_non_contiguous_inputs_and_strided_gradients():
    plain, selection, model = toy()
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(10, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    for module in (plain, model):
        module(x).transpose(0, 1)[:, ::2].square().sum().backward()
    full = {part.name: part for part in selection.bind(plain, layout=plain.layout()).params}
    for part in bound.params:
        whole = full[part.name.removesuffix("_slice")]
        want = torch.cat(whole.blocks(whole.param.grad), whole.dim).reshape(part.param.shape)
        torch.testing.assert_close(part.param.grad, want, rtol=1e-12, atol=1e-14)


def test_a_bias_or_a_weight_alone():
    for kept in ("weight", "bias"):
        _, selection, model = toy(parts=("q",))
        plain = copy.deepcopy(model)
        bound = alps.slice_heads(model, selection, layout=model.layout())
        leaf = {part.name: part.param for part in bound.params}[f"q.{kept}_slice"]
        for part in bound.params:
            part.param.requires_grad_(part.param is leaf)
        saved = []
        x = torch.randn(5, 10, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = model.q(x)
        y.square().sum().backward()
        plain.q(x).square().sum().backward()
        want = torch.cat([getattr(plain.q, kept).grad[:3], getattr(plain.q, kept).grad[9:]])
        torch.testing.assert_close(leaf.grad, want)
        assert [part.param.grad is not None for part in bound.params] == [part.param is leaf for part in bound.params]
        assert len(saved) == (kept == "weight")


def test_a_module_used_twice_in_one_forward():
    plain, selection, model = toy(parts=("q", "o"))
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(5, 10, dtype=torch.float64)
    for module in (plain, model):
        module.o(module.q(module.o(module.q(x)).tanh())).square().sum().backward()
    for name in ("q", "o"):
        full = getattr(plain, name).weight.grad
        want = torch.cat([full[:3], full[9:]]) if name == "q" else torch.cat([full[:, :3], full[:, 9:]], 1)
        got = {part.name: part.param.grad for part in bound.params}[f"{name}.weight_slice"]
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_gradients_have_the_leafs_dtype_and_value(dtype):
    plain, heads, sliced, bound = pair("qwen2", dtype)
    for model in (plain, sliced):
        loss_of(model).backward()
    want = cut_grads(plain, heads)
    for name, grad in grads(bound).items():
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, want[name], rtol=0.02 if dtype != torch.float32 else 1e-5,
                                   atol=2e-4 if dtype != torch.float32 else 1e-7)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_autocast_gives_the_plain_models_gradients(model_type):
    plain, heads, sliced, bound = pair(model_type)
    losses = []
    for model in (plain, sliced):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model)
        losses.append(loss)
        loss.backward()
    assert torch.equal(*losses)
    want = cut_grads(plain, heads)
    for name, grad in grads(bound).items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, want[name], rtol=0.02, atol=1e-4)


def test_backward_inside_autocast_is_no_coarser():
    plain, heads, sliced, bound = pair("llama")
    loss_of(plain).backward()
    loss = loss_of(sliced)
    leaf = bound.params[-1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert leaf.param.grad.dtype == torch.float32 and leaf.param.grad.any()


def test_gradients_accumulate_and_clip_like_any():
    plain, heads, sliced, bound = pair()
    for model in (plain, sliced):
        for seed in range(3):
            (loss_of(model, seed) / 3).backward()
    want = cut_grads(plain, heads)
    for name, grad in grads(bound).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-7)
    norm = torch.nn.utils.clip_grad_norm_(sliced.parameters(), 1e-3)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in want.values()]).norm().item(), rel=1e-4)
    clipped = torch.cat([grad.flatten() for grad in grads(bound).values()]).norm().item()
    assert clipped == pytest.approx(1e-3, rel=1e-3)


def test_no_gradient_is_formed_and_nothing_saved_where_none_is_wanted():
    _, _, sliced, bound = pair()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not loss_of(sliced).requires_grad
        with torch.inference_mode():
            inferred = loss_of(sliced)
        for part in bound.params:
            part.param.requires_grad_(False)
        frozen = loss_of(sliced)
    assert not saved and not frozen.requires_grad and torch.equal(inferred, frozen)


def test_backward_stops_below_the_lowest_selected_layer():
    plain = tiny("llama")
    layout = alps.find_heads(plain)
    heads = alps.HeadSelection([(1, 1)], layout.heads_per_layer)
    alps.slice_heads(plain, heads)
    seen = {}
    for i, layer in enumerate(plain.model.layers):
        layer.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out.requires_grad))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(len(seen)) or t, lambda t: t):
        loss_of(plain)
    assert seen == {0: False, 1: True, 2: True}
    assert 0 not in saved and 1 in saved


def test_a_layer_without_selected_heads_stays_what_it_was():
    plain, _, sliced, _ = pair()
    kinds = [type(module.self_attn.q_proj) for module in sliced.model.layers]
    assert kinds[0] is nn.Linear and issubclass(kinds[1], Sliced) and issubclass(kinds[1], nn.Linear)


def test_double_backward_says_so():
    _, selection, model = toy()
    bound = alps.slice_heads(model, selection, layout=model.layout())
    x = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    assert bound.params


def test_all_heads_need_no_slices_and_none_train_nothing():
    model = tiny("llama")
    layout = alps.find_heads(model)
    bound = alps.slice_heads(model, alps.HeadSelection.all(layout))
    assert not any(isinstance(m, Sliced) for m in model.modules()) and all(part.full for part in bound.params)
    loss_of(model).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    bound = alps.slice_heads(model, alps.HeadSelection.none(layout))
    assert not bound.params and not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "bert"])
def test_the_rest_may_train_too(model_type):
    plain = tiny(model_type, dtype=torch.float64)
    heads = some_heads(plain)
    sliced = copy.deepcopy(plain)
    bound = alps.slice_heads(sliced, heads, rest="trainable")
    assert heads.bind(sliced).rest == "trainable"
    for model in (plain, sliced):
        loss_of(model).backward()
    full = {part.name: part for part in heads.bind(plain, rest="trainable").params}
    for part in bound.params:
        whole = full[part.name.removesuffix("_slice")]
        want = torch.cat(whole.blocks(whole.param.grad), whole.dim).reshape(part.param.shape)
        torch.testing.assert_close(part.param.grad, want, rtol=1e-12, atol=1e-14)
    assert len(bound.params) == len(full) and batch(plain)
