"""Heads are located in every kind of layout, exactly once, and nothing else is."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from alps_kernels.layout import HeadLayout, LayoutError, find_heads

WIDTH, VOCAB = 48, 96
LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB}
BERT = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
}
BART = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": VOCAB,
}
LATENT = LLAMA | {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "kv_lora_rank": 20,
    "q_lora_rank": 16,
    "first_k_dense_replace": 2,
    "n_routed_experts": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 4,
}
FALCON = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCAB}

# id: (model type, configuration, head, its slices (role, dim, start, stop) in the first layer but for biases)
CASES = {
    "head size is not width / heads": (
        "llama",
        LLAMA | {"head_dim": 20},
        3,
        [("q", 0, 60, 80), ("o", 1, 60, 80), ("k", 0, 20, 40), ("v", 0, 20, 40)],
    ),
    "biases": ("qwen2", LLAMA, 1, [("q", 0, 12, 24), ("o", 1, 12, 24), ("k", 0, 0, 12), ("v", 0, 0, 12)]),
    "transposed": (
        "gpt2",
        GPT,
        2,
        [("q", 1, 24, 36), ("o", 0, 24, 36), ("k", 1, 72, 84), ("v", 1, 120, 132)],
    ),
    "fused in blocks": (
        "phi3",
        LLAMA,
        3,
        [("q", 0, 36, 48), ("o", 1, 36, 48), ("k", 0, 60, 72), ("v", 0, 84, 96)],
    ),
    "fused per head": (
        "gpt_neox",
        {k: v for k, v in LLAMA.items() if "key_value" not in k},
        1,
        [("q", 0, 36, 48), ("o", 1, 12, 24), ("k", 0, 48, 60), ("v", 0, 60, 72)],
    ),
    "codegen": (
        "codegen",
        GPT | {"rotary_dim": 4, "n_head": 8},
        3,
        [("q", 0, 42, 48), ("o", 1, 18, 24), ("k", 0, 66, 72), ("v", 0, 54, 60)],
    ),
    "falcon, one kv head": (
        "falcon",
        FALCON,
        2,
        [("q", 0, 24, 36), ("o", 1, 24, 36), ("k", 0, 48, 60), ("v", 0, 60, 72)],
    ),
    "falcon, per head": (
        "falcon",
        FALCON | {"multi_query": False, "alibi": True},
        1,
        [("q", 0, 36, 48), ("o", 1, 12, 24), ("k", 0, 48, 60), ("v", 0, 60, 72)],
    ),
    "falcon, per kv group": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        3,
        [("q", 0, 60, 72), ("o", 1, 36, 48), ("k", 0, 72, 84), ("v", 0, 84, 96)],
    ),
    "bigcode, per head": (
        "gpt_bigcode",
        GPT | {"multi_query": False},
        1,
        [("q", 0, 36, 48), ("o", 1, 12, 24), ("k", 0, 48, 60), ("v", 0, 60, 72)],
    ),
    "latent": (
        "deepseek_v3",
        LATENT,
        1,
        [("q", 0, 12, 20), ("q_rope", 0, 20, 24), ("o", 1, 6, 12), ("k", 0, 14, 22), ("v", 0, 22, 28)],
    ),
    "gated": (
        "qwen3_next",
        LLAMA
        | {
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        1,
        [("q", 0, 16, 24), ("gate", 0, 24, 32), ("o", 1, 8, 16), ("k", 0, 0, 8), ("v", 0, 0, 8)],
    ),
    "pairs": (
        "diffllama",
        LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4},
        3,
        [
            ("q", 0, 18, 24),
            ("q", 0, 42, 48),
            ("o", 1, 36, 48),
            ("k", 0, 6, 12),
            ("v", 0, 6, 12),
            ("k", 0, 18, 24),
            ("v", 0, 18, 24),
        ],
    ),
    "bare parameters": (
        "xlnet",
        {"d_model": WIDTH, "n_head": 4, "n_layer": 1, "d_inner": 32, "vocab_size": VOCAB},
        1,
        [("q", 1, 12, 24), ("o", 1, 12, 24), ("k", 1, 12, 24), ("v", 1, 12, 24)],
    ),
}


def tiny(model_type: str, config: dict, auto=AutoModelForCausalLM, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return auto.from_config(AutoConfig.for_model(model_type, **config)).eval()


def owned_once(layout: HeadLayout) -> None:
    """Every row of q, k and v and every column of o belongs to exactly one head or group."""
    spans: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for layer in layout.layers:
        for unit in (*layer.heads, *layer.groups):
            for part in unit:
                spans.setdefault((part.param, part.dim), []).append((part.start, part.stop))
    for (name, dim), found in spans.items():
        shape = layout.shapes[name]
        edges = [edge for span in sorted(found) for edge in span]
        assert edges[0] == 0 and edges[-1] == (shape[0] if dim == 0 else torch.Size(shape[1:]).numel()), name
        assert edges[1:-1:2] == edges[2::2], name


@pytest.mark.parametrize("case", CASES)
def test_slices(case):
    model_type, config, head, want = CASES[case]
    layout = find_heads(tiny(model_type, config))
    assert [(p.role, p.dim, p.start, p.stop) for p in layout.slices(0, head) if not p.bias] == want
    owned_once(layout)


@pytest.mark.parametrize("case", CASES)
def test_behaviour(case):
    """The same by behaviour, through `HeadLayout.verify`."""
    model = tiny(*CASES[case][:2])
    find_heads(model).verify(model)


def test_biases_go_with_their_rows():
    layout = find_heads(tiny("qwen2", LLAMA))
    biases = {
        (p.role, p.param.rpartition(".")[0].rpartition(".")[2], p.start, p.stop)
        for p in layout.slices(1, 3)
        if p.bias
    }
    assert biases == {("q", "q_proj", 36, 48), ("k", "k_proj", 12, 24), ("v", "v_proj", 12, 24)}


def test_shared_layers_count_once():
    model = tiny("albert", BERT | {"embedding_size": 16, "num_hidden_layers": 12}, AutoModelForMaskedLM)
    assert find_heads(model).heads_per_layer == (4,)


def test_towers_and_kinds():
    layout = find_heads(tiny("bart", BART, AutoModelForSeq2SeqLM))
    assert [(a.tower, a.kind, a.n_heads) for a in layout.layers] == [
        ("encoder", "self", 4),
        ("decoder", "self", 3),
        ("decoder", "cross", 3),
    ]
    assert layout.where("decoder-cross") == (2,)


def test_bert_is_one_stack():
    layout = find_heads(tiny("bert", BERT, AutoModelForMaskedLM))
    assert {a.tower for a in layout.layers} == {""} and layout.layers[0].output.endswith(
        "attention.output.dense"
    )


def test_keys_of_another_layer():
    config = LLAMA | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "head_dim": 12,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    model = tiny("gemma3n_text", config)
    layout = find_heads(model)
    layout.verify(model)
    assert [(a.n_groups, a.kv_layer) for a in layout.layers] == [(2, None), (2, None), (0, 0), (0, 1)]
    assert layout.layers[2].group_of == (0, 0, 1, 1)
    assert [p.role for p in layout.slices(3, 0)] == ["q", "o"]


def test_packed_attention_of_torch():
    model = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
    layout = find_heads(model)
    assert [(p.param, p.role, p.start, p.stop) for p in layout.slices(0, 1)] == [
        ("self_attn.in_proj_weight", "q", 12, 24),
        ("self_attn.in_proj_bias", "q", 12, 24),
        ("self_attn.out_proj.weight", "o", 12, 24),
        ("self_attn.in_proj_weight", "k", 60, 72),
        ("self_attn.in_proj_bias", "k", 60, 72),
        ("self_attn.in_proj_weight", "v", 108, 120),
        ("self_attn.in_proj_bias", "v", 108, 120),
    ]
    layout.verify(model, inputs={"src": torch.randn(2, 5, WIDTH)})


class Adapter(nn.Module):
    """The shape of a LoRA layer: the base beside something small."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base, nn.Linear(base.in_features, 2, bias=False)

    def forward(self, x):
        return self.base_layer(x)


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def test_wrappers_are_seen_through():
    model = tiny("llama", LLAMA)
    plain = find_heads(model)
    wrapped = find_heads(Wrapped(model))
    assert [p.param for p in wrapped.slices(0, 0)] == ["module." + p.param for p in plain.slices(0, 0)]
    compiled = find_heads(torch.compile(model))
    assert compiled.slices(1, 3)[0].param == "_orig_mod." + plain.slices(1, 3)[0].param
    assert plain.model_type == wrapped.model_type == compiled.model_type == "llama"
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.o_proj = Adapter(layer.self_attn.o_proj)
    adapted = find_heads(model)
    assert adapted.slices(0, 1)[0].param == "model.layers.0.self_attn.q_proj.base_layer.weight"
    adapted.verify(model)


def test_meta_model_of_8b_is_fast():
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    started = time.perf_counter()
    layout = find_heads(model)
    assert time.perf_counter() - started < 1.0
    assert layout.n_heads == 1024 and layout.layers[0].n_groups == 8


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 4),
    per=st.integers(1, 4),
    half=st.integers(1, 12),
    bias=st.booleans(),
    kind=st.sampled_from(["llama", "phi3"]),
)
def test_any_sizes_are_owned_once(groups, per, half, bias, kind):
    heads = groups * per
    config = LLAMA | {
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "hidden_size": heads * 2 * half,
    }
    config |= {"attention_bias": bias, "head_dim": 6 * half} if kind == "llama" else {}
    with torch.device("meta"):
        layout = find_heads(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)))
    owned_once(layout)
    assert layout.heads_per_layer == (heads,) * 2
    assert layout.layers[0].group_of == tuple(h // per for h in range(heads))


@pytest.mark.parametrize(
    "model_type, config",
    [
        ("mamba", {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": VOCAB}),
        (
            "rwkv",
            {
                "hidden_size": WIDTH,
                "attention_hidden_size": WIDTH,
                "num_hidden_layers": 2,
                "vocab_size": VOCAB,
            },
        ),
    ],
)
def test_state_space_models_refuse(model_type, config):
    with pytest.raises(LayoutError, match=f"{model_type}: no module of this model holds attention heads"):
        find_heads(tiny(model_type, config))


def test_mixture_of_heads_refuses():
    model = tiny("jetmoe", LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1, "kv_channels": 12})
    with pytest.raises(LayoutError, match=r"self_attention \(JetMoeAttention\).*kv_proj"):
        find_heads(model)


def broken(change) -> nn.Module:
    model = tiny("llama", LLAMA)
    change(model.model.layers[1].self_attn)
    return model


def packed(attention: nn.Module) -> None:
    attention.k_proj.weight = nn.Parameter(
        torch.zeros(48 * 24 // 2, 1, dtype=torch.uint8), requires_grad=False
    )


def stripped(attention: nn.Module) -> None:
    del attention.v_proj.weight
    attention.v_proj.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))


def too_narrow(attention: nn.Module) -> None:
    attention.q_proj = nn.Linear(WIDTH, 30)


def no_value(attention: nn.Module) -> None:
    attention.v_proj, attention.values = None, nn.Linear(WIDTH, 24)
    attention.q_proj, attention.queries = None, nn.Linear(WIDTH, WIDTH)


def two_outputs(attention: nn.Module) -> None:
    attention.o_proj = nn.Linear(40, WIDTH)


@pytest.mark.parametrize(
    "change, message",
    [
        (packed, r"layers\.1\.self_attn\.k_proj \(Linear\).*quantised or packed.*uint8"),
        (stripped, r"layers\.1\.self_attn\.v_proj \(Linear\) has no weight matrix.*qweight"),
        (too_narrow, r"layers\.1\.self_attn.*do not divide"),
        (no_value, r"layers\.1\.self_attn \(LlamaAttention\).*\['k_proj', 'o_proj'\].*not a known set"),
        (two_outputs, r"layers\.1\.self_attn.*o_proj takes 40 features"),
    ],
)
def test_one_module_that_cannot_be_located_refuses_all(change, message):
    with pytest.raises(LayoutError, match=message):
        find_heads(broken(change))
