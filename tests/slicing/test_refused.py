"""What cannot be sliced is refused by name, and the model is then what it was."""

import copy

import pytest
import torch
from torch import nn
from transformers import WavLMConfig, WavLMModel

import alps_kernels as alps
from alps_kernels.layout import AttentionLayer, HeadLayout, HeadSlice, LayoutError
from alps_kernels.slicing.projection import Sliced
from alps_kernels.tensors import synced_slices_in

from .cases import loss_of, pair, some_heads, tiny
from .toy import toy


def fingerprint(model):
    return ([(name, id(p), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
            [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()])


def refused(model, heads, message, error=LayoutError, **options):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        alps.slice_heads(model, heads, **options)
    assert fingerprint(model) == before


def adapters(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["k_proj"])), \
        r"layers\.1\.self_attn\.k_proj\.base_layer \(Linear\) is wrapped by Linear; take the adapter off"


def own_forward(model):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model.model.layers[1].self_attn.k_proj.__class__ = Scaled
    return model, r"layers\.1\.self_attn\.k_proj \(Scaled\) has a forward of its own"


def hooked(model):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    add_hook_to_module(model.model.layers[1].self_attn.v_proj, AlignDevicesHook(execution_device="cpu"))
    return model, r"layers\.1\.self_attn\.v_proj \(Linear\) has a forward of its own"


def parametrized(model):
    nn.utils.parametrizations.orthogonal(model.model.layers[1].self_attn.o_proj)
    return model, r"layers\.1\.self_attn.*o_proj"


def tied(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    return model, r"mlp\.up_proj\.weight is tied to model\.layers\.1\.self_attn\.q_proj\.weight"


def reads_weights_itself(model):
    class Odd(type(model.model.layers[1].self_attn)):
        def forward(self, hidden_states, *args, **kwargs):
            hidden_states = hidden_states + hidden_states @ self.q_proj.weight.T
            return super().forward(hidden_states, *args, **kwargs)

    model.model.layers[1].self_attn.__class__ = Odd
    return model, r"layers\.1\.self_attn\.q_proj \(Linear\): Odd multiplies with its weight itself"


@pytest.mark.parametrize("change", [adapters, own_forward, hooked, parametrized, tied, reads_weights_itself],
                         ids=lambda f: f.__name__)
def test_a_projection_that_is_not_plain(change):
    heads = some_heads(tiny())
    model, message = change(tiny())
    refused(model, heads, message)


def test_the_class_that_only_asks_a_weights_dtype_is_no_such_case():
    model = tiny()

    class Asks(type(model.model.layers[1].self_attn)):
        def forward(self, hidden_states, *args, **kwargs):
            assert self.q_proj.bias is None
            return super().forward(hidden_states.to(self.q_proj.weight.dtype), *args, **kwargs)

    for layer in model.model.layers:
        layer.self_attn.__class__ = Asks
    alps.slice_heads(model, some_heads(model))


def test_speech_models_that_hand_their_weights_to_a_function():
    model = WavLMModel(WavLMConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                                   conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=16,
                                   num_conv_pos_embedding_groups=2, num_feat_extract_layers=1))
    layout = alps.find_heads(model)
    refused(model, alps.HeadSelection([(0, 0)], layout.heads_per_layer), "WavLMAttention multiplies with its weight itself")


@pytest.mark.parametrize("parts", [("q", "k", "v"), ("o",)])
def test_torchs_multihead_attention(parts):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 4)})
    layout = alps.find_heads(model)
    message = r"attn \(MultiheadAttention\) holds selected heads in in_proj" if "q" in parts else \
        r"attn\.out_proj \(NonDynamicallyQuantizableLinear\) is part of an nn\.MultiheadAttention"
    refused(model, alps.HeadSelection([(0, 0)], layout.heads_per_layer, parts=parts), message)


def test_bare_matrices_and_convolutions():
    from transformers import XLNetConfig, XLNetModel

    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=4, d_inner=16))
    heads = alps.HeadSelection([(0, 1)], alps.find_heads(model).heads_per_layer)
    refused(model, heads, r"XLNetRelativeAttention\) holds selected heads in q and is neither")
    conv = nn.ModuleDict({"attn": nn.Module()})
    conv["attn"].q = nn.Conv1d(8, 8, 1)
    shapes = {name: tuple(p.shape) for name, p in conv.named_parameters()}
    layout = HeadLayout((AttentionLayer(0, "attn", "self", "", tuple(
        (HeadSlice("attn.q.weight", "q", 0, 2 * h, 2 * h + 2),) for h in range(4)), (), (0, 1, 2, 3)),), shapes)
    refused(conv, alps.HeadSelection([(0, 1)], (4,)), r"attn\.q \(Conv1d\) holds selected heads", layout=layout)


def test_a_selection_of_another_model_or_no_selection():
    model = tiny()
    refused(model, alps.HeadSelection([(0, 0)], (4, 4)), "8 heads in 2 layers", ValueError)
    refused(model, [(0, 0)], "heads is a list; expected a HeadSelection", TypeError)
    refused(model, some_heads(model), "rest is 'all'", ValueError, rest="all")


def test_inference_mode():
    _, selection, model = toy()
    with torch.inference_mode():
        refused(model, selection, "inference mode cannot train", layout=model.layout())


def test_slicing_anew_that_fails_leaves_the_first_slices():
    _, heads, sliced, bound = pair()
    mlp = sliced.model.layers[0].mlp
    kept, mlp.up_proj.weight = mlp.up_proj.weight, sliced.model.layers[0].self_attn.q_proj.weight
    refused(sliced, alps.HeadSelection([(0, 1)], heads.heads_per_layer), "is tied to")
    mlp.up_proj.weight = kept
    loss_of(sliced).backward()
    assert all(part.param.grad is not None for part in bound.params)


def test_unslicing_what_is_not_sliced_or_sharded_since():
    with pytest.raises(ValueError, match="this model is not sliced"):
        alps.unslice_heads(tiny())
    _, _, sliced, _ = pair()
    name, module = next((n, m) for n, m in sliced.named_modules() if isinstance(m, Sliced))
    plain = type(module)
    module.__class__ = type("FSDP" + plain.__name__, (plain,), {})
    with pytest.raises(ValueError, match=f"{name} .FSDPSlicedLinear. is sharded or wrapped"):
        alps.unslice_heads(sliced)
    module.__class__ = plain
    alps.unslice_heads(sliced)
    assert not list(synced_slices_in(sliced))


def test_a_full_weight_that_is_set_to_train_is_an_error_and_not_a_silence():
    _, _, sliced, _ = pair()
    sliced.requires_grad_(True)
    with pytest.raises(RuntimeError, match="SlicedLinear: the full parameter .* of a sliced projection requires grad"):
        loss_of(sliced)
    with torch.no_grad():
        loss_of(sliced)


def test_an_old_gradient_of_a_frozen_parameter_goes():
    plain = tiny()
    heads = some_heads(plain)
    loss_of(plain).backward()
    model = copy.deepcopy(plain)
    loss_of(model).backward()
    alps.slice_heads(model, heads)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
