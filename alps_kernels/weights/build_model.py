"""A checkpoint's model as transformers builds it: from its config on the meta device, or loaded whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


def skeleton(config: Any, path: Path) -> nn.Module:
    """The model that `config` describes, on the meta device: names and shapes, no values."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    with _one_line(f"{path}: transformers cannot build its {config.model_type} model"), torch.device("meta"):
        return named(config) if known else transformers.AutoModel.from_config(config)


def load_whole(path: Path, described: nn.Module, params: Iterable[str]) -> nn.Module:
    """The model of a checkpoint folder on the CPU, as transformers loads it, converting what has to be.

    Args:
        described: the model on the meta device.
        params: what it must hold.
    """
    if not path.is_dir():
        raise ValueError(f"{path} has to be converted while loading, which works for folders only; "
                         "load the model and give that instead")
    with _one_line(f"{path}: transformers cannot load this checkpoint"), torch.device("cpu"):
        model, report = type(described).from_pretrained(path, config=described.config, dtype="auto",
                                                        output_loading_info=True)
    if lost := sorted(set(params) & set(report["missing_keys"])):
        raise ValueError(f"{path} does not hold {lost[0]}, says transformers, which loaded it")
    return model


def load_gguf(file: Path) -> nn.Module:
    """The model of a GGUF file on the CPU, dequantised to float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    with _one_line(f"{file}: transformers cannot load this GGUF"), torch.device("cpu"):
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)


def read_config(path: Path, given: Any, like: str | os.PathLike | None) -> Any:
    """The PretrainedConfig of a checkpoint; see `open_checkpoint`."""
    from transformers import PretrainedConfig

    if isinstance(given, PretrainedConfig):
        return given
    document = given if isinstance(given, Mapping) else _config_document(Path(path if given is None else given))
    if document is None:
        raise ValueError(f"{path} has no config.json, so its heads cannot be located; give config=")
    with _one_line(f"{path}: transformers refuses its config"):
        found = _typed(document)
        if found is None and like is not None and not (document.get("model_type") or document.get("architectures")):
            other = _config_document(Path(like)) or {}
            if _same_sizes(document, other):
                found = _typed({**document, **{key: other.get(key) for key in ("model_type", "architectures")}})
    if found is None:
        raise ValueError(f"{path}: its config states neither a model_type nor architectures that transformers knows "
                         f"({document.get('model_type')!r}, {document.get('architectures')!r}); give config=")
    return found


def _typed(document: Mapping[str, Any]) -> Any:
    """The document as the config class of its model type, else of its architecture, else None."""
    import transformers

    kind, architectures = document.get("model_type"), document.get("architectures")
    if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
        return transformers.CONFIG_MAPPING[kind].from_dict(dict(document))
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        named = getattr(transformers, architectures[0], None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named.config_class.from_dict({**document, "model_type": named.config_class.model_type})
    return None


def _config_document(path: Path) -> dict[str, Any] | None:
    """The JSON of a config file, or of config.json in a folder or beside a file; None where there is none."""
    if path.is_dir() or path.suffix != ".json" or path.name.endswith(".index.json"):
        path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None
    data = path.read_bytes()
    with _one_line(f"{path} is not JSON"):
        document = json.loads(data, object_hook=_number)
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a {type(document).__name__}; expected an object")
    return document


def _number(entry: dict[str, Any]) -> Any:
    """transformers writes infinite numbers of a config as {"__float__": "Infinity"}."""
    return float(entry["__float__"]) if entry.keys() == {"__float__"} else entry


def _same_sizes(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """The sizes that both state are equal, and there are some."""
    words = ("hidden", "heads", "layers", "head_dim", "intermediate", "n_embd", "d_model")
    shared = [key for key in a if key in b and type(a[key]) is int and any(word in key for word in words)]
    return bool(shared) and all(a[key] == b[key] for key in shared)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Any error becomes a ValueError of one line: torn files and sizes that do not go together may fail anywhere."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error
