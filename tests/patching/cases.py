"""Tiny models of several layouts, tuned on some heads, for tests of head patches."""

import copy

import torch
from transformers import (
    BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
    LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM,
    T5Config, T5ForConditionalGeneration,
)

import alps_kernels as alps

LLAMA = dict(vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)
NEOX = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}

MODELS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **more})),
    "qwen2 (bias)": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "gpt2 (Conv1D)": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=4, n_positions=32)),
    "phi3 (fused)": lambda: Phi3ForCausalLM(Phi3Config(**{**LLAMA, "pad_token_id": 0, "hidden_size": 32})),
    "gpt_neox (interleaved)": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=24, intermediate_size=16, num_hidden_layers=2,
                                               num_attention_heads=4)),
    "t5 (cross)": lambda: T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=16, num_layers=2,
                                                              num_heads=4, decoder_start_token_id=0)),
    "mixtral (experts)": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=2)),
}


def build(name="llama", dtype=torch.float32, **more):
    torch.manual_seed(0)
    model = MODELS[name](**more).to(dtype).eval()
    if name.startswith("mixtral"):
        model.set_experts_implementation("eager")  # the other knows no float64
    return model


def pick(model, heads=((0, 1), (1, 0), (1, 3)), **options):
    """A selection of some heads of the first two layers, of q, k, v and o unless told."""
    layout = alps.find_heads(model)
    options = {"parts": ("q", "k", "v", "o"), **options}
    return alps.HeadSelection(heads, layout.heads_per_layer, summary=layout.summary(), **options)


def tune(model, heads, seed=1, scale=0.05):
    """A copy of `model` whose slices of `heads` differ in most bytes, frozen as training would leave it."""
    tuned, noise = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in heads.freeze(tuned).params:
            for block in part.blocks(part.param):
                block += scale * torch.randn(block.shape, generator=noise).to(block.dtype)
    return tuned


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bytes(model, snap):
    now = model.state_dict()
    return now.keys() == snap.keys() and all(
        now[name].dtype == value.dtype and torch.equal(raw(now[name]), raw(value)) for name, value in snap.items())


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def pointers(model):
    return {name: param.data_ptr() for name, param in model.named_parameters()}


def logits(model, **more):
    ids = torch.arange(12).reshape(2, 6) % 31 + 1
    with torch.no_grad():
        return model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}), **more).logits
