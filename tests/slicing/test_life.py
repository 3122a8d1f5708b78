"""A sliced model is saved, loaded, copied, moved, asked and given back like any other."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.selection import selection_of
from alps_kernels.slicing.projection import Sliced
from alps_kernels.tensors import LEAF_SUFFIX, leaf_of, synced_slice_of, synced_slices_in

from ..optim.cases import same_bytes
from .cases import MODELS, batch, loss_of, pair, some_heads, tiny


def trained(model_type="qwen2", **options):
    """(plain model as it was, heads, sliced model after two steps, leaves)."""
    plain, heads, sliced, bound = pair(model_type, **options)
    optimizer = torch.optim.AdamW([part.param for part in bound.params], lr=0.02)
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(sliced, seed).backward()
        optimizer.step()
    return plain, heads, sliced, bound


def agree(model):
    return all(torch.equal(synced.cut(synced.weight), synced.leaf) for _, synced in synced_slices_in(model))


def same_leaves(a, b):
    return [(part.name, id(part.param)) for part in a.params] == [(part.name, id(part.param)) for part in b.params]


@pytest.mark.parametrize("model_type", MODELS)
def test_unslicing_gives_the_plain_model_with_the_trained_weights(model_type):
    plain, heads, sliced, _ = trained(model_type)
    plain.requires_grad_(True)
    out = loss_of(sliced, 5)
    keys = list(sliced.state_dict())
    assert alps.unslice_heads(sliced) is sliced
    assert torch.equal(loss_of(sliced, 5), out) and out.item() != loss_of(plain, 5).item()
    assert [type(m) for m in sliced.modules()] == [type(m) for m in plain.modules()]
    assert [(n, p.requires_grad) for n, p in sliced.named_parameters()] == [(n, True) for n, _ in plain.named_parameters()]
    assert keys == list(plain.state_dict()) == list(sliced.state_dict())
    assert not any(hasattr(m, "_synced") or "_trained" in vars(m) for m in sliced.modules())
    loss_of(sliced).backward()
    assert all(part.param.grad is not None for part in heads.bind(sliced).params)


def test_requires_grad_comes_back_as_it_was_and_not_as_all_true():
    plain, heads, _, _ = pair()
    plain.requires_grad_(False)
    plain.lm_head.requires_grad_(True)
    plain.model.layers[1].self_attn.q_proj.requires_grad_(True)
    before = {name: param.requires_grad for name, param in plain.named_parameters()}
    alps.slice_heads(plain, heads)
    other = alps.HeadSelection([(0, 3)], heads.heads_per_layer)
    alps.slice_heads(plain, other)
    alps.unslice_heads(copy.deepcopy(plain))
    alps.unslice_heads(plain)
    assert {name: param.requires_grad for name, param in plain.named_parameters()} == before


def test_requires_grad_and_weights_after_a_silent_change():
    _, _, sliced, bound = trained()
    for part in bound.params:
        part.param.data += 0.1  # leaves no trace
    leaves = {name: synced.leaf.detach().clone() for name, synced in synced_slices_in(sliced)}
    parts = dict(synced_slices_in(sliced))
    alps.unslice_heads(sliced)
    for name, param in sliced.named_parameters():
        assert param.requires_grad and (name not in leaves or torch.equal(parts[name].cut(param), leaves[name]))


def test_the_state_dict_is_the_plain_models():
    plain, _, sliced, bound = trained()
    for part in bound.params:
        part.param.data += 0.1  # leaves no trace
    saved = sliced.state_dict()
    assert list(saved) == list(plain.state_dict()) and agree(sliced)
    plain.load_state_dict(saved, strict=True)
    assert torch.equal(loss_of(plain, 5), loss_of(sliced, 5))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_plain_state_dict_reaches_the_leaves(assign):
    _, heads, sliced, bound = trained()
    other = tiny("qwen2", seed=3)
    assert not sliced.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=assign).unexpected_keys
    assert torch.equal(loss_of(sliced, 5), loss_of(other, 5)) and agree(sliced)
    assert same_leaves(heads.bind(sliced), bound) or assign
    loss_of(sliced).backward()
    assert all(part.param.grad is not None for part in heads.bind(sliced).params)
    torch.optim.SGD([part.param for part in heads.bind(sliced).params], 0.5).step()
    assert agree(sliced) and not torch.equal(loss_of(sliced, 5), loss_of(other, 5))


def test_loading_is_strict_and_a_leaf_is_no_key():
    _, _, sliced, bound = trained()
    saved = sliced.state_dict()
    name = next(part.name for part in bound.params if part.name.endswith(LEAF_SUFFIX))
    with pytest.raises(RuntimeError, match="Unexpected key.*" + name):
        sliced.load_state_dict({**saved, name: torch.zeros(1)})
    before = [part.param.detach().clone() for part in bound.params]
    with pytest.raises(RuntimeError, match="Missing key"):
        sliced.load_state_dict({key: value for key, value in saved.items() if key != name.removesuffix(LEAF_SUFFIX)})
    assert agree(sliced) and all(torch.equal(a, part.param) for a, part in zip(before, bound.params, strict=True))
    with pytest.raises(RuntimeError, match="size mismatch"):
        sliced.load_state_dict({**saved, name.removesuffix(LEAF_SUFFIX): torch.zeros(3)})
    assert agree(sliced) and any(key == name for key, _ in sliced.named_parameters())


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file], ids=lambda f: f.__name__)
def test_a_copy_is_sliced_too_and_apart(model_type, copied):
    _, heads, sliced, bound = trained(model_type)
    other = copied(sliced)
    assert torch.equal(loss_of(other, 5), loss_of(sliced, 5))
    theirs = heads.bind(other)
    assert [p.name for p in theirs.params] == [p.name for p in bound.params]
    loss_of(other).backward()
    torch.optim.SGD([part.param for part in theirs.params], 0.5).step()
    assert agree(other) and agree(sliced)
    assert not torch.equal(loss_of(other, 5), loss_of(sliced, 5))
    for part in theirs.params:
        assert part.param is not {p.name: p.param for p in bound.params}[part.name]
    alps.unslice_heads(other)
    assert all(p.requires_grad for p in other.parameters())


def test_moves_keep_leaf_and_weight_together():
    _, heads, sliced, bound = trained()
    want = loss_of(copy.deepcopy(sliced).double(), 5)
    sliced.double()
    assert torch.equal(loss_of(sliced, 5), want)
    assert same_leaves(heads.bind(sliced), bound)
    assert all(part.param.dtype == torch.float64 for part in bound.params)
    loss_of(sliced).backward()
    torch.optim.SGD([part.param for part in bound.params], 0.5).step()
    assert agree(sliced) and not torch.equal(loss_of(sliced, 5), want)
    sliced.to(torch.bfloat16)
    assert loss_of(sliced, 5).isfinite() and agree(sliced)
    for _, synced in synced_slices_in(sliced):
        assert synced.writable(synced.leaf) and synced_slice_of(synced.leaf) is synced and leaf_of(synced.weight) is synced.leaf


def test_conversions_that_replace_parameters_are_followed():
    _, heads, sliced, _ = trained()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        sliced.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert all(synced.writable(synced.leaf) and synced_slice_of(synced.leaf) is synced for _, synced in synced_slices_in(sliced))
    assert loss_of(sliced).isfinite() and all(p.param.dtype == torch.float64 for p in heads.bind(sliced).params)


def test_a_model_on_the_meta_device_is_sliced_and_then_filled():
    full = tiny("qwen2")
    heads = some_heads(full)
    for fill in ("assign", "empty"):
        with torch.device("meta"):
            model = copy.deepcopy(full).to("meta")
        bound = alps.slice_heads(model, heads)
        assert all(part.param.is_meta for part in bound.params)
        if fill == "assign":
            model.load_state_dict(full.state_dict(), assign=True)
            for name, value in full.named_buffers():
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._buffers[key] = value.clone()
        else:
            model.to_empty(device="cpu").load_state_dict(full.state_dict())
            for name, value in full.named_buffers():
                model.get_buffer(name).copy_(value)
        assert torch.equal(loss_of(model, 5), loss_of(full, 5))
        bound = heads.bind(model)
        loss_of(model).backward()
        assert all(part.param.grad is not None for part in bound.params) and agree(model)
        assert all(synced.writable(synced.leaf) and synced_slice_of(synced.leaf) is synced for _, synced in synced_slices_in(model))


def test_checkpoints_of_transformers_are_ordinary(tmp_path):
    for model_type in ("qwen2", "gpt2"):
        plain, _, sliced, _ = trained(model_type)
        sliced.save_pretrained(tmp_path / model_type)
        loaded = type(plain).from_pretrained(tmp_path / model_type).eval()
        assert torch.equal(loss_of(loaded, 5), loss_of(sliced, 5))
        assert not any(isinstance(m, Sliced) for m in loaded.modules())
        for (name, a), b in zip(loaded.state_dict().items(), sliced.state_dict().values(), strict=True):
            assert same_bytes(a, b), name


def test_parameters_are_listed_once_and_modes_are_modes():
    plain, _, sliced, bound = trained()
    names = [name for name, _ in sliced.named_parameters()]
    assert len(names) == len(set(names)) == len(list(plain.named_parameters())) + sum(LEAF_SUFFIX in n for n in names)
    assert {name for name, p in sliced.named_parameters() if p.requires_grad} == {part.name for part in bound.params}
    assert sliced.train().training and all(m.training for m in sliced.modules())
    assert not sliced.eval().training
    assert "rows train" in repr(sliced)


@pytest.mark.parametrize("model_type", MODELS)
def test_heads_are_found_and_verified_on_a_sliced_model(model_type):
    plain, heads, sliced, bound = pair(model_type)
    layout = alps.find_heads(plain)
    assert alps.find_heads(sliced) == layout
    layout.verify(sliced)
    again = heads.bind(sliced)
    assert same_leaves(again, bound)
    assert all(part.full for part in again.params)
    assert again.numel == heads.bind(plain).numel and selection_of(sliced) is heads


def test_freezing_a_sliced_model_leaves_it_as_slicing_did():
    _, heads, sliced, bound = pair()
    before = [(name, p.requires_grad) for name, p in sliced.named_parameters()]
    assert same_leaves(heads.freeze(sliced), bound)
    assert [(name, p.requires_grad) for name, p in sliced.named_parameters()] == before


def test_another_selection_needs_slicing_anew_and_carries_the_weights_on():
    _, heads, sliced, bound = trained()
    other = alps.HeadSelection([(0, 3), (1, 0)], heads.heads_per_layer)
    for wrong in (other, alps.HeadSelection(heads.heads, heads.heads_per_layer, parts=("q",))):
        with pytest.raises(ValueError, match="slice the model for this selection first"):
            wrong.bind(sliced)
    out = loss_of(sliced, 5)
    new = alps.slice_heads(sliced, other)
    assert torch.equal(loss_of(sliced, 5), out) and {p.name for p in new.params} != {p.name for p in bound.params}
    assert {n for n, p in sliced.named_parameters() if p.requires_grad} == {p.name for p in new.params}
    loss_of(sliced).backward()
    torch.optim.SGD([part.param for part in new.params], 0.5).step()
    alps.unslice_heads(sliced)
    assert not torch.equal(loss_of(sliced, 5), out)


def test_the_same_selection_again_keeps_the_leaves_for_their_optimizer():
    _, heads, sliced, bound = trained()
    again = alps.slice_heads(sliced, heads)
    assert same_leaves(again, bound)


def test_a_shared_module_is_one_leaf():
    _, _, sliced, bound = pair("albert")
    assert len([m for m in sliced.modules() if isinstance(m, Sliced)]) == len({p.name.rpartition(".")[0] for p in bound.params})


def test_an_average_of_weights_follows_its_leaves():
    _, _, sliced, bound = trained()
    average = torch.optim.swa_utils.AveragedModel(sliced)
    loss_of(sliced).backward()
    torch.optim.SGD([part.param for part in bound.params], 0.5).step()
    average.update_parameters(sliced)
    average.update_parameters(sliced)
    assert torch.equal(loss_of(average.module, 5), loss_of(average.module, 5)) and agree(average.module)
    assert isinstance(average.module.model.layers[1].self_attn.q_proj, nn.Linear) and batch(sliced)
