"""Tiny random models of every model type that transformers registers for a task.

A configuration is shrunk by the meaning of its field names, recursively through its sub
configurations. Heads (4), kv heads (2), head size (16), model width (96) and inner width (112)
are all different, and heads * head size is not the width, so that a mistaken one shows.
"""

from __future__ import annotations

import copy
import functools
import operator
import re

import torch
from torch import nn

from .inputs import model_inputs

HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, VOCAB = 4, 2, 16, 96, 112, 320
MAPPINGS = {
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "speech": ("SPEECH_SEQ_2_SEQ", "CTC", "AUDIO_CLASSIFICATION"),
    "vision-language": ("IMAGE_TEXT_TO_TEXT",),
}

LAYERS = re.compile(r"(num_|n_)?(hidden_)?layers?|.*_layers|depth|n_layers?|num_blocks|resampler_depth|num_layers_per_stack")
# (field name, cap); the first that matches decides. `None` leaves the field alone.
CAPS: tuple[tuple[str, int | None], ...] = tuple((re.compile(pattern), cap) for pattern, cap in (
    (r"num_(conv_pos_embed.*_groups|feat_extract_layers|adapter_layers)|depths", None),
    (r"(num_)?nextn_predict_layers|cross_attention_frequency|num_kv_shared_layers", 1),
    (r".*(_token_id|_token_index|_index|_id)", None),
    (r".*vocab(_size.*)?|additional_vocab_size|vocab_offset|num_embeddings|encoder_hash_byte_group_vocab", VOCAB),
    (r"num_(key_value|kv)_heads|.*_num_key_value_heads|kv_n_heads|n_kv_heads", KV_HEADS),
    (r"linear_num_key_heads", 2),
    (r".*(attention|_n|num)_?heads|n_heads?|index_n_heads|attention_heads|resampler_heads|decoder_num_heads", HEADS),
    (r"attention_head_dim", None),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim", 8),
    (r"v_head_dim", 12),
    (r"qk_head_dim", 24),
    (r"index_head_dim", 16),
    (r"(linear|swa|cross|global|mamba|resampler)_.*head_dim|mamba_d_head|linear_head_dim|d_head|d_kv|dim_head|kv_channels", HEAD_DIM),
    (r"head_dim", HEAD_DIM),
    (r"(q|kv|o)_lora_rank|.*lora_rank|laurel_rank|hc_lowrank|gated_norm_rank|.*dt_rank|time_step_rank", 20),
    (r".*(intermediate|ffn|feed_forward|mlp_dim|hidden_dim|inner)(_.*)?(size|dim|mlp)?|d_ff|dim_ff|dff", INNER),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|.*top_k", 2),
    (r"topk_group|n_group|num_expert_group", 1),
    (r".*experts|zero_expert_num", 4),
    (LAYERS.pattern, 2),
    (r"patch_size", 4),
    (r"image_size|max_image_size|resolution", 32),
    (r"(max_)?.*position.*embeddings|n_positions|n_ctx|max_seq_len|model_max_length|.*_seq_len", 512),
    (r"num_position_embeddings", 64),
    (r"max_(source|target)_positions", 64),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window|window_size|local_attention_window_len", 8),
    (r"chunk_size|mamba_chunk_size|block_size|index_block_size|index_topk", 8),
    (r"state_size|mamba_d_state|ssm_state_size", 16),
    (r".*(hidden|embed|embedding|embd|model|channels|output|projection|proj|adapter_in|adapter_out).*_?(size|dim|dimension|input_dim)"
     r"|hidden_size_global|d_model|n_embd|dim|emb_dim|embed_dim|.*_width|output_channels|input_dim|ple_embed_dim", WIDTH),
    (r"ngram_vocab_size_base", 500),
    (r"num_mel_bins|feature_size|n_mel_bins", 16),
    (r"num_conv_pos_embeddings|conv_pos_kernel_size", 9),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_query_tokens|latent_query_num|num_latents|resampler_n_latents|resampler_num_latents|image_seq_length|mm_tokens_per_image", 4),
    (r"(mamba_)?n_?groups", 2),
    (r"rotary_dim", 8),
    (r"max_length", 64),
    (r"codebook_size", 256),
    (r"num_filters|base_channels|subsampling_conv_channels|conv_channels", 32),
))


# Fields that a default configuration leaves empty although the model needs them.
FILL = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "num_key_value_heads": KV_HEADS,
        "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ASSISTANT = {f"text_config.{k}": v for k, v in {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "per_layer_config": {1: {"head_dim": 32}, 3: {"head_dim": 32}}}.items()}
# What the rules above cannot know, by `model_type` of the (sub) configuration.
OVERRIDES: dict[str, dict] = {
    "bamba": {"mamba_d_head": 48, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_d_head": 48, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "helium": {"head_dim": WIDTH // HEADS},
    "pix2struct_text_model": {"d_kv": WIDTH // HEADS},
    "blt": {"patching_threshold": 100.0},  # long patches: a lone token leaves a query nothing to choose
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": HEADS},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": HEADS},
    "nemotron3_diarization_audio": {"num_key_value_heads": HEADS},
    "mobilebert": {"intra_bottleneck_size": 64, "true_hidden_size": 64, "embedding_size": WIDTH},
    "mistral4": {"rope_parameters.partial_rotary_factor": 1 / 3},
    "paddleocr_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [4, 2, 2]}},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "deepseek_v4": {"rope_parameters": {k: _ROPE | {"partial_rotary_factor": 0.5} for k in ("main", "compress")},
                    "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, "o_groups": 2,
                    "qk_rope_head_dim": 8, "head_dim": 16},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 48, "mamba_headdim": 48, "n_mamba_heads": 4, "kv_channels": 48,
               "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "mamba2": {"head_dim": 48, "num_heads": 4},
    "cohere_compass_text": {"rope_parameters": {t: _ROPE | {"mrope_section": [4, 2, 2]} for t in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "reformer": {"axial_pos_embds_dim": [32, 64], "axial_pos_shape": [4, 8], "attention_head_size": 16,
                 "attn_layers": ["local", "lsh"], "num_hidden_layers": 2, "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
                 "num_buckets": 2, "is_decoder": True},
    "xlnet": {"d_head": 24},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 48, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "esm": {"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 32},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "granite_speech_plus_encoder": {"hidden_dim": WIDTH, "context_size": 8, "max_pos_emb": 16},
    "granite_speech_encoder": {"hidden_dim": WIDTH, "context_size": 8, "max_pos_emb": 16},
    "wav2vec2-bert": {"vocab_size": 64},
    "chameleon": {"vocabulary_map": {"<image>": 200} | {f"IMGIMG{c}Z": 201 + i for i, c in enumerate("ABCD")}},
    "emu3": {"vocabulary_map": {"<image>": 200} | {f"<|visual token {i:06d}|>": 201 + i for i in range(4)}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [5, 5, 2]}},
    "gemma4_assistant": _ASSISTANT | {"text_config.num_kv_shared_layers": 4},
    "gemma4_unified_assistant": _ASSISTANT,
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [WIDTH] * 4},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "dots3_note_text": {"num_key_value_heads": HEADS, "head_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": INNER},
    "perceiver": {"d_latents": 64, "d_model": WIDTH, "num_self_attends_per_block": 2, "num_cross_attention_heads": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]},
    "mimi": {"num_filters": 6, "upsample_groups": WIDTH},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "wav2vec2-conformer": {"vocab_size": 64},
    "fun_asr_nano": {"adaptor_config.intermediate_size": WIDTH // 4},
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_kpool": 4},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "2/4"},
}


def model_types(task: str) -> list[str]:
    """The model types that transformers registers for `task`, sorted."""
    return sorted(_classes(task))


def _classes(task: str) -> dict[str, str]:
    """Model type -> class name; a type of several mappings keeps its first class."""
    from transformers.models.auto import modeling_auto

    classes: dict[str, str] = {}
    for name in MAPPINGS[task]:
        for model_type, cls in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES", {}).items():
            classes.setdefault(model_type, cls if isinstance(cls, str) else cls[0])
    return classes


def cap_of(name: str) -> int | None:
    for pattern, cap in CAPS:
        if pattern.fullmatch(name):
            return cap
    return None


def _layer_picks(lists: list[list], at_most: int = 6) -> list[int]:
    """Indices of layers that show every distinct combination of the per-layer lists, two or more."""
    seen: dict[str, int] = {}
    for i, row in enumerate(zip(*lists)):
        seen.setdefault(repr(row), i)
    picks = sorted(seen.values())[:at_most]
    if len(picks) < 2:
        picks = list(range(min(2, len(lists[0]))))
    return picks


def shrink(config: dict, head_dim: int | None = HEAD_DIM, kv_heads: int = KV_HEADS) -> dict:
    """The configuration dictionary with small sizes; see the module's docstring."""
    lists, n_layers = _per_layer(config)
    kv_heads = HEADS if config.get("kv_lora_rank") else kv_heads  # latent attention expands to every head
    picks = _layer_picks(list(lists.values())) if lists else None
    small = {}
    for name, value in config.items():
        small[name] = _small(str(name), value, config, head_dim, kv_heads)
        if name in lists and name != "per_layer_config":
            small[name] = [small[name][i] for i in picks] if lists[name] != list(range(n_layers)) else list(range(len(picks)))
        elif picks and type(value) is int and value == n_layers and LAYERS.fullmatch(str(name)):
            small[name] = len(picks)
    if "head_dim" in config and "qk_nope_head_dim" in config:
        rotary = config["head_dim"] == config["qk_rope_head_dim"]
        small["head_dim"] = small["qk_rope_head_dim"] if rotary else small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    elif head_dim is not None and "head_dim" in config:
        small["head_dim"] = head_dim
    small.update({name: value for name, value in FILL.items() if name in config and config[name] is None})
    for name, value in OVERRIDES.get(config.get("model_type"), {}).items():
        *path, last = name.split(".")
        functools.reduce(operator.getitem, path, small)[last] = value
    if (layers := config.get("per_layer_config")) and small["per_layer_config"] is layers:
        rows = {int(i): _scaled(row, config, small) for i, row in layers.items()}
        small["per_layer_config"] = {new: rows[old] for new, old in enumerate(picks) if old in rows}
    return small


def _per_layer(config: dict) -> tuple[dict[str, list], int]:
    """The lists that hold one entry per layer, `per_layer_config` spread out as one of them."""
    n_layers = next((config[k] for k in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
                     if isinstance(config.get(k), int)), 0)
    lists = {k: list(v) for k, v in config.items() if isinstance(v, (list, tuple)) and len(v) == n_layers > 2}
    lists = {k: v for k, v in lists.items() if k not in ("depths", "patch_sizes", "hidden_sizes")}
    if layers := config.get("per_layer_config"):
        rows = {int(i): row for i, row in layers.items()}
        lists["per_layer_config"] = [rows.get(i) for i in range(n_layers)]
    return lists, n_layers


def _scaled(row: dict, config: dict, small: dict) -> dict:
    """One layer's own sizes, in the proportion they have to the whole model's."""
    return {k: v * small[k] // config[k] if type(v) is int and type(config.get(k)) is int and config[k] else v
            for k, v in row.items()}


def _small(name: str, value, config: dict, head_dim: int | None, kv_heads: int):
    if isinstance(value, dict):
        if name in ("rope_parameters", "rope_scaling"):
            return _small_rope(value, config, head_dim)
        if name == "per_layer_config":
            return value
        return shrink(value, head_dim, kv_heads)
    if name == "head_dim":
        return None if head_dim is None else value and min(value, head_dim)
    if type(value) is int and value > 0:
        if name.endswith(("_token_id", "_token_index")) and value >= VOCAB:
            return 200 + sum(map(ord, name)) % 100
        cap = cap_of(name)
        if cap is KV_HEADS and ("kv" in name or "key_value" in name):
            cap = kv_heads
        return value if cap is None else min(value, cap)
    if isinstance(value, (list, tuple)):
        return [_small(name, item, config, head_dim, kv_heads) for item in value]
    return value


def _small_rope(rope: dict, config: dict, head_dim: int | None) -> dict:
    """Rotary parameters whose sections add up to half of the small head."""
    rope = {k: _small_rope(v, config, head_dim) if isinstance(v, dict) else copy.copy(v) for k, v in rope.items()}
    size = head_dim or WIDTH // HEADS
    rotary = int(size * (rope.get("partial_rotary_factor") or 1.0)) // 2
    if isinstance(section := rope.get("mrope_section"), (list, tuple)):
        parts = [rotary // len(section)] * len(section)
        parts[0] += rotary - sum(parts)
        rope["mrope_section"] = parts
    return rope


TASK_OVERRIDES = {("masked", "reformer"): {"is_decoder": False}}
# Default configurations that do not construct by themselves.
BASE: dict[str, dict] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
}


def tiny_model(task: str, model_type: str, seed: int = 0) -> tuple[nn.Module, dict, str]:
    """A random float32 CPU model of the type in eval mode, its forward inputs, and why they fail ("" where not).

    Tries an explicit head size that is not width / heads first, then the ordinary one, then as
    many kv heads as heads, and takes the first whose forward pass runs, else the first that was made.

    Raises:
        Exception: whatever the first attempt raised, when no model can be made.
    """
    import transformers

    cls = getattr(transformers, _classes(task)[model_type])
    made, refusal = None, None
    for head_dim, kv_heads in ((HEAD_DIM, KV_HEADS), (WIDTH // HEADS, KV_HEADS), (None, KV_HEADS), (None, HEADS)):
        try:
            small = shrink(cls.config_class(**BASE.get(model_type, {})).to_dict(), head_dim, kv_heads)
            small.update(TASK_OVERRIDES.get((task, model_type), {}))
            torch.manual_seed(seed)
            model = cls(cls.config_class(**small)).eval()
        except Exception as error:  # a configuration may refuse these sizes in its own way
            refusal = refusal or error
            continue
        inputs, failure = model_inputs(model)
        if not failure:
            return model, inputs, ""
        made = made or (model, inputs, failure)
    if made is None:
        raise refusal
    return made
