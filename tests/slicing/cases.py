"""Tiny models of many attention layouts, and runs over them with their heads sliced."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import alps_kernels as alps

WIDTH, VOCAB = 48, 96
LLAMA = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ONE_EACH = {k: v for k, v in LLAMA.items() if "key_value" not in k}
BERT = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": VOCAB, "pad_token_id": 0}
CAUSAL, MASKED, SEQ2SEQ = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

# model type: (class, configuration)
MODELS = {
    "llama": (CAUSAL, LLAMA),
    "qwen2": (CAUSAL, LLAMA),
    "gpt2": (CAUSAL, {"n_embd": WIDTH, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB}),
    "phi3": (CAUSAL, LLAMA),
    "gpt_neox": (CAUSAL, ONE_EACH),
    "falcon": (CAUSAL, {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB,
                        "new_decoder_architecture": True, "num_kv_heads": 2}),
    "deepseek_v3": (CAUSAL, LLAMA | {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
                                     "v_head_dim": 6, "kv_lora_rank": 20, "q_lora_rank": 16, "first_k_dense_replace": 3,
                                     "n_routed_experts": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
                                     "head_dim": 4}),
    "bert": (MASKED, BERT),
    "albert": (MASKED, BERT | {"embedding_size": 16}),
    "t5": (SEQ2SEQ, {"d_model": WIDTH, "d_ff": 32, "num_layers": 2, "num_heads": 4, "d_kv": 12, "vocab_size": VOCAB,
                     "decoder_start_token_id": 0}),
    "bart": (SEQ2SEQ, {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                       "decoder_attention_heads": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCAB}),
}
PARTS = ("q", "k", "v", "o")


def tiny(model_type="llama", seed=0, dtype=torch.float32, **changes):
    cls, config = MODELS[model_type]
    torch.manual_seed(seed)
    model = cls.from_config(AutoConfig.for_model(model_type, **{**config, **changes}))
    with torch.no_grad():  # zero biases would hide a bias in the wrong place
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.normal_(std=0.1)
    return model.to(dtype).eval()


def some_heads(model, parts=PARTS, n=None, seed=0, kv="any"):
    """Heads that lie apart and heads that touch, in some layers only."""
    layout = alps.find_heads(model)
    every = list(layout)
    if n is None:
        last = layout.layers[-1].index
        chosen = [h for h in every if h[0] == last and h[1] in (0, 2)] + [h for h in every if h[0] == 1 and h[1] < 2]
        chosen = sorted(set(chosen))
    else:
        return alps.HeadSelection.random(layout, k=n, seed=seed, parts=parts, kv=kv)
    return alps.HeadSelection(chosen, layout.heads_per_layer, parts=parts, kv=kv)


def batch(model, seed=0, rows=2, length=7):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "labels": ids.flip(1)}
    if "decoder_input_ids" in model.forward.__code__.co_varnames:
        inputs["decoder_input_ids"] = ids.roll(1, 1)
    return inputs


def loss_of(model, seed=0, **shape):
    return model(**batch(model, seed, **shape)).loss


def pair(model_type="llama", dtype=torch.float32, parts=PARTS, **options):
    """(plain model, its selection, a sliced copy, the bound leaves)."""
    plain = tiny(model_type, dtype=dtype)
    heads = some_heads(plain, parts, **options)
    sliced = copy.deepcopy(plain)
    return plain, heads, sliced, alps.slice_heads(sliced, heads)


def cut_grads(plain, heads):
    """What of the plain model's full gradients belongs to the selection, by leaf name."""
    cuts = {}
    for part in heads.bind(plain, rest="frozen").params:
        blocks = part.blocks(part.param.grad)
        whole = torch.cat(blocks, part.dim)
        cuts[part.name if part.full else part.name + "_slice"] = whole[:, 0] if part.param.ndim == 1 else whole
    return cuts


def grads(bound):
    return {part.name: part.param.grad for part in bound.params}
