"""`layout.verify`: right layouts pass, every sort of wrong one is caught, and the model stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from alps_kernels.layout import AttentionLayer, HeadLayout, HeadSlice, LayoutError, find_heads
from tests.layout.test_find_heads import BART, BERT, LLAMA, tiny


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama", LLAMA | {"head_dim": 12})


def edited(layout: HeadLayout, change: Callable[[AttentionLayer], AttentionLayer], at: int = 1) -> HeadLayout:
    layers = tuple(change(layer) if layer.index == at else layer for layer in layout.layers)
    return dataclasses.replace(layout, layers=layers)


def map_parts(units, change: Callable[[HeadSlice], HeadSlice]):
    return tuple(tuple(change(part) for part in unit) for unit in units)


def rotated(layer: AttentionLayer) -> AttentionLayer:
    """Head h is given the query of head h + 1."""
    queries = [[p for p in unit if p.role == "q"] for unit in layer.heads]
    rest = [[p for p in unit if p.role != "q"] for unit in layer.heads]
    return dataclasses.replace(
        layer, heads=tuple(tuple(q + r) for q, r in zip(queries[1:] + queries[:1], rest, strict=True))
    )


def shifted(layer: AttentionLayer) -> AttentionLayer:
    """Values one row late."""

    def late(part: HeadSlice) -> HeadSlice:
        return dataclasses.replace(part, start=part.start + 1) if part.role == "v" else part

    last = (
        *map_parts(
            layer.groups[:1], lambda p: dataclasses.replace(p, stop=p.stop + 1) if p.role == "v" else p
        ),
        *layer.groups[1:],
    )
    return dataclasses.replace(layer, groups=map_parts(last, late))


def swapped_outputs(layer: AttentionLayer) -> AttentionLayer:
    outputs = [[p for p in unit if p.role == "o"] for unit in layer.heads]
    rest = [[p for p in unit if p.role != "o"] for unit in layer.heads]
    order = [1, 0, *range(2, layer.n_heads)]
    return dataclasses.replace(layer, heads=tuple(tuple(rest[h] + outputs[o]) for h, o in enumerate(order)))


def strided_groups(layer: AttentionLayer) -> AttentionLayer:
    """Group h % G in place of h // (H / G)."""
    return dataclasses.replace(layer, group_of=tuple(h % layer.n_groups for h in range(layer.n_heads)))


def keys_as_values(layer: AttentionLayer) -> AttentionLayer:
    """Two groups change places in the value projection."""
    values = [[p for p in unit if p.role == "v"] for unit in layer.groups]
    rest = [[p for p in unit if p.role != "v"] for unit in layer.groups]
    return dataclasses.replace(
        layer, groups=tuple(tuple(r + v) for r, v in zip(rest, values[::-1], strict=True))
    )


FAULTS = [rotated, shifted, swapped_outputs, strided_groups, keys_as_values]


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_layouts_are_caught(model, fault):
    wrong = edited(find_heads(model), fault)
    with pytest.raises(
        LayoutError, match=r"model\.layers\.1\.self_attn: layer 1, (head|group) \d.*moves columns"
    ):
        wrong.verify(model)


def frozen_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("fault", [None, rotated])
def test_the_model_is_left_as_it_was(model, fault):
    model.train()
    model.model.norm.eval()
    layout = find_heads(model)
    before, modes = frozen_bytes(model), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    if fault is None:
        layout.verify(model)
    else:
        with pytest.raises(LayoutError):
            edited(layout, fault).verify(model)
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert all(param.grad is None for param in model.parameters())


def test_weights_come_back_when_the_model_raises(model):
    layout, before = find_heads(model), frozen_bytes(model)
    calls = 0

    def fail(module, args):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise RuntimeError("out of memory")

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        layout.verify(model)
    handle.remove()
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(model, dtype):
    model = model.to(dtype)
    find_heads(model).verify(model)


def test_output_beside_the_attention_module():
    model = tiny("bert", BERT, AutoModelForMaskedLM)
    find_heads(model).verify(model)


def test_norm_over_all_heads_does_not_blur():
    model = tiny("olmo2", LLAMA)
    find_heads(model).verify(model)


def test_encoder_decoder():
    model = tiny("bart", BART, AutoModelForSeq2SeqLM)
    find_heads(model).verify(model)


def test_layers_that_inputs_do_not_reach_are_an_error():
    model = tiny("bart", BART | {"is_decoder": True})
    layout = find_heads(model)
    cross = layout.where("cross")
    with pytest.raises(LayoutError, match="encoder_attn: the inputs do not reach this attention module"):
        layout.verify(model)
    layout.verify(model, layers=layout.where("self"))
    encoded = torch.randn(1, 5, 48)
    layout.verify(
        model, inputs={"input_ids": torch.arange(4)[None], "encoder_hidden_states": encoded}, layers=cross
    )


def test_pictures_have_to_be_given():
    model = tiny(
        "vit",
        {
            "hidden_size": 48,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        AutoModel,
    )
    layout = find_heads(model)
    with pytest.raises(LayoutError, match="ViTModel takes pixel_values.*pass `inputs`"):
        layout.verify(model)
    layout.verify(model, inputs={"pixel_values": torch.randn(1, 3, 8, 8)})


def test_meta_models_cannot_be_checked():
    with torch.device("meta"):
        model = tiny("llama", LLAMA)
    with pytest.raises(LayoutError, match=r"q_proj\.weight.*meta device"):
        find_heads(model).verify(model)


def test_another_model_is_refused(model):
    with pytest.raises(LayoutError, match="there is no such weight"):
        find_heads(tiny("gpt2", {"n_embd": 48, "n_head": 4, "n_layer": 1, "vocab_size": 96})).verify(model)
