"""Forward inputs for tiny models, guessed from signatures and configurations."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn

BATCH, TOKENS, TARGETS, SOURCE = 2, 12, 7, 9
# Attention that a model with text alone calls, but that passes its input through.
IDLE_IN_TEXT = ("EvollaSequenceAlignerCrossAttention",)


def size_of(config, *names: str, default: int = 0) -> int:
    """The first of the fields that is a positive number (or starts with one)."""
    for name in names:
        value = getattr(config, name, None)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:240]


def model_inputs(model: nn.Module) -> tuple[dict, str]:
    """(inputs with which the whole model runs, ""), or (the last inputs tried, why it failed)."""
    first, failure = None, ""
    for inputs in candidates(model):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs, ""
        except Exception as error:  # the next guess may fit
            first, failure = first or inputs, failure or reason(error)
    return first or {}, failure


def candidates(model: nn.Module) -> Iterator[dict]:
    """Guesses, the fullest first: text, then text with something to attend to, sound, pixels."""
    wanted = inspect.signature(model.forward).parameters
    takes = set(wanted) | ({"use_cache"} if any(p.kind is p.VAR_KEYWORD for p in wanted.values()) else set())
    torch.manual_seed(1)
    text = {k: v for k, v in text_inputs(model).items() if k in takes}
    sound = [{k: v for k, v in guess.items() if k in takes} for guess in sound_inputs(model)]
    targets = {k: v for k, v in text.items() if k.startswith("decoder_") or k == "use_cache"}
    if getattr(model, "main_input_name", "input_ids") in ("input_features", "input_values"):
        yield from (targets | guess for guess in sound)
        yield from (text | guess for guess in sound)
    if "encoder_hidden_states" in takes and not getattr(model.config, "is_encoder_decoder", False):
        width = size_of(_text(model.config), "hidden_size", "d_model", default=96)
        yield text | {"encoder_hidden_states": torch.randn(BATCH, SOURCE, width)}
    if "shared_kv_states" in takes:
        yield assistant_inputs(model)
    yield text
    yield {k: v for k, v in text.items() if k not in ("attention_mask", "use_cache")}
    books = size_of(getattr(model.config, "decoder", model.config), "num_codebooks")
    if books:
        ids = torch.randint(6, 60, (BATCH * books, TOKENS))
        yield {"input_ids": ids, "use_cache": False}
        yield {"decoder_input_ids": ids, "input_ids": ids[:BATCH], "use_cache": False}
        yield {"input_ids": ids.view(BATCH, TOKENS, books), "use_cache": False}
    if channels := size_of(getattr(model.config, "decoder_config", model.config), "num_channels"):
        yield text | {"decoder_input_ids": torch.randint(6, 60, (BATCH, TARGETS, channels))}
    yield from (guess for guess in sound if guess)


def _text(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def text_inputs(model: nn.Module) -> dict:
    vocab = min(size_of(_text(model.config), "vocab_size", default=64), 190)
    ids = torch.randint(6, vocab, (BATCH, TOKENS))
    ones = torch.ones(BATCH, TOKENS, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ones, "use_cache": False,
            "decoder_input_ids": torch.randint(6, vocab, (BATCH, TARGETS))}


def sound_inputs(model: nn.Module) -> list[dict]:
    """Guesses at spectra or waves."""
    config = model.config
    for name in ("audio_config", "encoder_config", "encoder", "speech_config"):
        config = getattr(config, name, None) or config
    bins = size_of(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size",
                   "input_dim", "input_size", default=16)
    frames = 2 * size_of(config, "max_source_positions", default=32)
    ones = torch.ones(BATCH, frames, dtype=torch.long)
    by_time, by_bin = torch.randn(BATCH, frames, bins), torch.randn(BATCH, bins, frames)
    wave = torch.randn(BATCH, 4000)
    guesses = [{"input_values": wave}, {"input_values": wave[:, None]}]
    if length := size_of(config, "max_length"):
        guesses.insert(0, {"input_values": torch.randn(BATCH, length, bins)})
    for spectrum in (by_time, by_bin):
        guesses += [{"input_features": spectrum}, {"input_features": spectrum, "attention_mask": ones}]
    return guesses


def assistant_inputs(model: nn.Module) -> dict:
    """A draft model that reads the keys and values of another."""
    text = model.config.get_text_config()
    width = size_of(model.config, "backbone_hidden_size", default=96)
    shared = {}
    for i, kind in enumerate(text.layer_types):
        fields = text.to_dict()
        head_dim = fields.get("per_layer_config", {}).get(f"{i:02d}", {}).get("head_dim", fields["head_dim"])
        shape = (BATCH, text.num_key_value_heads, TOKENS, head_dim)
        shared[kind] = (torch.randn(shape), torch.randn(shape))
    return {"inputs_embeds": torch.randn(BATCH, 1, 2 * width), "shared_kv_states": shared,
            "position_ids": torch.full((BATCH, 1), TOKENS)}


def tower_inputs(module: nn.Module, root_config) -> Iterator[dict]:
    """Guesses for a part of a model: pictures as pixels or as patches, spectra, queries, hidden states."""
    config = getattr(module, "config", root_config)
    wanted = {n: p for n, p in inspect.signature(module.forward).parameters.items() if p.kind is not p.VAR_KEYWORD}
    if "input_ids" in wanted or "input_features" in wanted or "input_values" in wanted:
        with_config = nn.Module.__new__(type(module)) if not hasattr(module, "config") else module
        yield from candidates(with_config) if hasattr(with_config, "config") else ()
    patch = size_of(config, "patch_size", default=4)
    channels = size_of(config, "num_channels", "in_channels", "in_chans", default=3)
    side = size_of(config, "image_size", default=32)
    frames = size_of(config, "temporal_patch_size", "patch_temporal", default=1)
    width = size_of(config, "hidden_size", "d_model", "embed_dim", "hidden_dim", default=96)
    grid = torch.tensor([[1, 8, 8]])
    flat = torch.randn(64, channels * frames * patch * patch)
    encoder_width = size_of(config, "encoder_hidden_size", "cross_attention_hidden_size", default=width)
    extras = {
        "grid_thw": grid, "image_grid_thw": grid, "grid_hws": torch.tensor([[8, 8]]), "image_sizes": torch.tensor([[side, side]] * BATCH),
        "spatial_shapes": torch.tensor([[8, 8]] * BATCH), "pixel_attention_mask": torch.ones(BATCH, 64, dtype=torch.long),
        "target_sizes": torch.tensor([[8, 8]] * BATCH), "cu_seqlens": torch.tensor([0, 64], dtype=torch.int32),
        "encoder_hidden_states": torch.randn(BATCH, SOURCE, encoder_width), "encoder_embeds": torch.randn(BATCH, SOURCE, encoder_width),
        "patch_attention_mask": torch.ones(BATCH, 8, 8, dtype=torch.bool), "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "query_length": TOKENS, "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long), "max_num_tiles": 1,
        "aspect_ratio_mask": torch.ones(BATCH, 1, 4, dtype=torch.long), "num_patches_per_image": 64,
        "merge_sizes": torch.tensor([2]), "padding_positions": torch.zeros(BATCH, 64, dtype=torch.bool),
        "pixel_position_ids": torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).view(1, 64, 2).repeat(BATCH, 1, 1),
    }
    needed = {n: extras[n] for n, p in wanted.items() if n in extras and p.default is p.empty}
    given = {n: v for n, v in extras.items() if n in wanted and n not in ("attention_mask", "pixel_attention_mask")}
    everything = {n: v for n, v in extras.items() if n in wanted}
    image = torch.randn(BATCH, channels, side, side)
    mains = {
        "pixel_values": [image, image[:1], image[:, None], torch.randn(BATCH, 64, channels * patch * patch), flat,
                         flat.view(1, 64, -1), image.view(BATCH, 1, 1, channels, side, side), image[:, :, None]],
        "hidden_states": [flat, torch.randn(BATCH, TOKENS, width), torch.randn(64, width)],
        "inputs_embeds": [torch.randn(BATCH, TOKENS, width)], "query_embeds": [torch.randn(BATCH, TOKENS, width)],
        "flattened_patches": [torch.cat([torch.randint(1, 8, (BATCH, TOKENS, 2)).float(), torch.randn(BATCH, TOKENS, channels * patch * patch)], -1)],
        "image_hidden_states": [torch.randn(BATCH, 64, width)], "context": [torch.randn(BATCH, SOURCE, width)],
        "x": [torch.randn(BATCH, TOKENS, width), image], "seq": [flat], "images": [image], "pixel_values_videos": [image[:, None], flat],
    }
    for name, values in mains.items():
        if name in wanted:
            for value in values:
                for more in (needed, given, everything):
                    yield {name: value} | {n: v for n, v in more.items() if n != name}


def attention_inputs(module: nn.Module) -> Iterator[dict]:
    """Guesses for one attention module by itself: the last resort where no tower could be run."""
    wanted = {n: p for n, p in inspect.signature(module.forward).parameters.items() if p.kind is not p.VAR_KEYWORD}
    widths = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    channels = [m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
    width = getattr(module, "embed_dim", None) or (widths or channels or [0])[0]
    head_dim = size_of(module, "head_dim", "attention_head_size", default=width // size_of(module, "num_heads", default=4))
    for flat in (False, True):
        tokens = (TOKENS,) if flat else (BATCH, TOKENS)
        angle = torch.randn(TOKENS, head_dim) if flat else torch.randn(1, TOKENS, head_dim)
        hidden, source = torch.randn(*tokens, width), torch.randn(BATCH, SOURCE, width)
        options = {
            "hidden_states": hidden, "x": hidden, "query": hidden, "query_states": hidden, "latents": hidden,
            "position_embeddings": (angle.cos(), angle.sin()), "cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32),
            "max_seqlen": TOKENS, "position_ids": torch.arange(TOKENS)[None], "attention_mask": None,
            "mask": torch.ones(BATCH, 2 * TOKENS), "target_sizes": torch.tensor([[4, 3]]),
            "input_features_mask": torch.ones(BATCH, TOKENS, dtype=torch.bool), "query_attn_mask": torch.ones(BATCH, TOKENS),
            "protein_kv_states": source, "structure_kv_states": None, "msa_kv_states": None,
            "protein_batch_mask": torch.ones(BATCH, dtype=torch.bool), "key_value_states": source, "encoder_hidden_states": source, "key": source, "value": source,
        }
        needed = {n for n, p in wanted.items() if p.default is p.empty}
        for extra in ({"key_value_states", "encoder_hidden_states", "position_embeddings", "cu_seqlens", "input_features_mask",
                       "protein_batch_mask"}, {"position_embeddings"}, set()):
            yield {n: options[n] for n in wanted if n in options and n in needed | extra}
    first = next(iter(wanted))
    yield {first: torch.randn(BATCH, 8, 8, width)}
    if channels:
        yield {first: torch.randn(BATCH, channels[0], 8, 8)}


def exercise(model: nn.Module, inputs: dict, recording) -> None:
    """Run the model, then every tower that this did not reach, on guessed inputs."""
    modules = dict(model.named_modules())
    for part in modules.values():
        if type(part).__name__ in IDLE_IN_TEXT:
            _try(recording, part, attention_inputs(part), part)
    _try(recording, model, [inputs])
    tried: set[nn.Module] = set()
    attention = [n for n, m in modules.items() if ("Attention" in type(m).__name__ or "Attn" in type(m).__name__)
                 and any(p.ndim > 1 for p in m.parameters())]
    for name in attention:
        parts = name.split(".")
        for i in range(1, len(parts)):
            part = modules[".".join(parts[:i])]
            if modules[name] in recording.calls:
                break
            if hasattr(part, "config") and part not in tried:
                tried.add(part)
                _try(recording, part, tower_inputs(part, model.config), modules[name])
        if modules[name] not in recording.calls:
            _try(recording, modules[name], attention_inputs(modules[name]), modules[name])


def _try(recording, module: nn.Module, guesses, until: nn.Module | None = None) -> None:
    """Run guesses until one reaches the module `until`; a wrong guess raises in many ways."""
    torch.manual_seed(2)
    for guess in guesses:
        with contextlib.suppress(Exception):
            recording.run(module, guess)
        if until is None or until in recording.calls:
            return
