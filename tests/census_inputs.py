"""Forward inputs for tiny models, guessed from signatures and configurations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn

BATCH, TOKENS, TARGETS, SOURCE = 2, 12, 7, 9


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
    failure = ""
    for inputs in candidates(model):
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs, ""
        except Exception as error:  # the next guess may fit
            failure = failure or reason(error)
    return inputs, failure


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
    yield from ({k: v for k, v in guess.items()} for guess in sound if guess)


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
        row = (text.per_layer_config or {}).get(i, {}) if getattr(text, "per_layer_config", None) else {}
        head_dim = (row if isinstance(row, dict) else vars(row)).get("head_dim", text.head_dim)
        shape = (BATCH, text.num_key_value_heads, TOKENS, head_dim)
        shared[kind] = (torch.randn(shape), torch.randn(shape))
    return {"inputs_embeds": torch.randn(BATCH, 1, 2 * width), "shared_kv_states": shared,
            "position_ids": torch.full((BATCH, 1), TOKENS)}


def exercise(model: nn.Module, inputs: dict, recording) -> None:
    """Run the model, then every tower that this did not reach, on guessed inputs."""
    try:
        recording.run(model, inputs)
    except Exception:  # the failure was reported when the model was made; its first layers may have run
        pass
