"""A checkpoint as `Weights`: its heads from config.json, its tensors a layer at a time.

The model class is instantiated on the meta device, so nothing but the attention tensors that are
asked for is ever read. What transformers must convert while loading is loaded whole instead.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import find_heads
from .tensor_files import TensorFiles, _main_file
from .weights import ModelWeights, Weights, prefixes

_FLOATS = ("float64", "float32", "float16", "bfloat16")


def open_checkpoint(path: str | os.PathLike, *, config: Any = None, like: str | os.PathLike | None = None) -> Weights:
    """The weights of a checkpoint folder or file.

    Args:
        path: a folder, or one .safetensors, .bin or .gguf file, or an index of shards.
        config: used instead of config.json: a path, dict or PretrainedConfig.
        like: another checkpoint, whose model type is taken where this config.json states none
            and the sizes in both agree.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is no checkpoint, or its model cannot be told; it says what is missing.
        LayoutError: the model's heads cannot be located.
    """
    path = Path(path)
    main = _main_file(path) if path.is_dir() else path
    if main.suffix == ".gguf" and main.is_file():
        return ModelWeights(_load_gguf(main), path.name)
    files = TensorFiles(path)
    return Checkpoint(path, files, skeleton(read_config(path, config, like), path))


class Checkpoint:
    """Streamed weights; see `weights.Weights`.

    Args:
        model: the checkpoint's model on the meta device.
    """

    def __init__(self, path: Path, files: TensorFiles, model: nn.Module) -> None:
        self.path, self.files, self.model = path, files, model
        self.name = path.resolve().name
        self.model_type = model.config.model_type
        self.layout = find_heads(model)
        self.shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        self._keys: dict[str, str] = {}
        self._whole: ModelWeights | None = None

    @property
    def in_memory(self) -> bool:
        return self._whole is not None

    def prepare(self, params: Iterable[str]) -> None:
        """Find the tensor of every parameter and check its shape and dtype.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a tensor is missing, quantised, or of another shape; it names tensor and file.
        """
        params = list(params)
        known, converted = renamed(self.model, self.files.files)
        _add_tied(self.model, known)
        if converted and not set(params) <= set(known):
            warnings.warn(f"{self.name}: transformers converts its attention weights while loading, so the whole "
                          "model is loaded instead of one layer at a time" if not set(self.layout.shapes) <= set(known)
                          else f"{self.name}: transformers converts some weights while loading, so the whole model is "
                          "loaded instead of one tensor at a time", stacklevel=4)
            self._keys = {name: known[name][0] for name in params if len(known.get(name, ())) == 1}
            self._whole = ModelWeights(self._load_whole(params), self.name)
            return self._whole.prepare(params)
        self._keys = self._resolve(params, known)
        stored = self.files.describe(self._keys.values())
        for name, key in self._keys.items():
            found, file = stored[key], self.files.files[key]
            if found.dtype not in _FLOATS:
                raise ValueError(f"{key} in {file} is stored as {found.dtype}: it is quantised or packed; expected "
                                 "floating-point weights of 16 bits or more (dequantise the checkpoint first)")
            if found.shape != self.shapes[name]:
                raise ValueError(f"{key} in {file} has shape {list(found.shape)}; the config makes it "
                                 f"{list(self.shapes[name])}")

    def read(self, params: Iterable[str]) -> dict[str, Tensor]:
        if self._whole is not None:
            return self._whole.read(params)
        names = {self._keys[name]: name for name in params}
        return {names[key]: tensor for key, tensor in self.files.read(names).items()}

    def dtypes(self, params: Iterable[str]) -> dict[str, str]:
        """The dtype of every prepared parameter, in torch's word."""
        if self._whole is not None:
            return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self.read(params).items()}
        found = self.files.describe(self._keys[name] for name in params)
        return {name: found[self._keys[name]].dtype for name in params}

    def stored(self, name: str) -> tuple[str, Path]:
        """The tensor that holds a prepared parameter, and its file.

        Raises:
            ValueError: transformers converts it while loading, so that no one tensor does.
        """
        if name not in self._keys:
            raise ValueError(f"{self.path} holds no tensor that is {name}: transformers converts it while loading")
        return self._keys[name], self.files.files[self._keys[name]]

    def _resolve(self, params: list[str], known: Mapping[str, list[str]]) -> dict[str, str]:
        """The stored tensor of every parameter: by name, else under one other prefix."""
        if set(params) <= set(known):
            found = known
        else:
            found = self._with_prefix(params, known)
        for name in params:
            if len(found[name]) > 1:
                raise ValueError(f"{self.path}: {' and '.join(found[name])} could both be {name}")
        return {name: found[name][0] for name in params}

    def _with_prefix(self, params: list[str], known: Mapping[str, list[str]]) -> dict[str, list[str]]:
        pairs = {prefixes(params[0], name) for name in known}
        counts = {pair: sum(_moved(name, pair) in known for name in params) for pair in pairs}
        fitting = [pair for pair, count in counts.items() if count == len(params)]
        if len(fitting) > 1:
            candidates = sorted(_moved(params[0], pair) for pair in fitting)
            raise ValueError(f"{self.path}: cannot tell which tensor is {params[0]}; it could be {', '.join(candidates)}")
        if fitting:
            return {name: known[_moved(name, fitting[0])] for name in params}
        # Named as it would be under the prefix that explains most of the others.
        best = max(counts, key=counts.__getitem__, default=("", ""))
        best = best if 2 * counts.get(best, 0) > len(params) else ("", "")
        missing = [_moved(name, best) or name for name in params if _moved(name, best) not in known]
        quantised = getattr(self.model.config, "quantization_config", None)
        raise ValueError(f"{self.files.path} does not hold {missing[0]}"
                         + (f" nor {len(missing) - 1} more attention tensors" if missing[1:] else "")
                         + ("; its config says that the weights are quantised, and scores need floating-point ones"
                            if quantised else f"; it holds {len(self.files.files)} tensors like {min(self.files.files)}"))

    def _load_whole(self, params: list[str]) -> nn.Module:
        if not self.path.is_dir():
            raise ValueError(f"{self.path} has to be converted while loading, which works for folders only; "
                             "load the model and give that instead")
        try:
            model, report = type(self.model).from_pretrained(self.path, config=self.model.config, dtype="auto",
                                                             output_loading_info=True)
        except Exception as error:  # a torn or foreign checkpoint may fail anywhere
            raise ValueError(f"{self.path}: transformers cannot load this checkpoint: {_said(error)}") from error
        if lost := sorted(set(params) & set(report["missing_keys"])):
            raise ValueError(f"{self.path} does not hold {lost[0]}, says transformers, which loaded it")
        return model


def _add_tied(model: nn.Module, known: dict[str, list[str]]) -> None:
    """A weight tied to another is stored once: under whichever name, it is found under all of them."""
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    for twins in names.values():
        stored = next((known[name] for name in twins if name in known), None)
        if stored is not None:
            known.update({name: stored for name in twins if name not in known})


def _moved(name: str, pair: tuple[str, str]) -> str | None:
    """`name` with the first prefix of `pair` replaced by the second; None where it has another."""
    cut, put = pair
    return put + name[len(cut):] if name.startswith(cut) else None


def renamed(model: nn.Module, keys: Iterable[str]) -> tuple[dict[str, list[str]], bool]:
    """Stored tensors by the name that transformers gives them while loading `model`.

    Returns:
        the keys that become each name unchanged in value, and whether any others are converted
        (split, fused, transposed ...): those are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    names, found, converted = model.state_dict(), {}, False
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if pattern is not None:
            converted = True
        else:
            found.setdefault(name, []).append(key)
    return found, converted


def skeleton(config: Any, path: Path) -> nn.Module:
    """The model that `config` describes, on the meta device: names and shapes, no values."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    try:
        with torch.device("meta"):
            return named(config) if known else transformers.AutoModel.from_config(config)
    except Exception as error:  # sizes that do not go together may fail anywhere
        raise ValueError(f"{path}: transformers cannot build its {config.model_type} model: {_said(error)}") from error


def _said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def read_config(path: Path, given: Any, like: str | os.PathLike | None) -> Any:
    """The PretrainedConfig of a checkpoint; see `open_checkpoint`."""
    from transformers import PretrainedConfig

    if isinstance(given, PretrainedConfig):
        return given
    document = given if isinstance(given, Mapping) else _config_document(Path(path if given is None else given))
    if document is None:
        raise ValueError(f"{path} has no config.json, so its heads cannot be located; give config=")
    try:
        found = _typed(document)
        if found is None and like is not None and not (document.get("model_type") or document.get("architectures")):
            other = _config_document(Path(like)) or {}
            if _same_sizes(document, other):
                found = _typed({**document, **{key: other.get(key) for key in ("model_type", "architectures")}})
    except Exception as error:  # configs check themselves, each in its own way
        raise ValueError(f"{path}: transformers refuses its config: {_said(error)}") from error
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
    try:
        document = json.loads(path.read_bytes(), object_hook=_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
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


def _load_gguf(file: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    try:
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    except Exception as error:  # a torn or foreign file may fail anywhere
        raise ValueError(f"{file}: transformers cannot load this GGUF: {_said(error)}") from error
