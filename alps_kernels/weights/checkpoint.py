"""A checkpoint as `Weights`: its heads from config.json, its tensors a layer at a time.

The model class is instantiated on the meta device, so nothing but the attention tensors that are
asked for is ever read. What transformers must convert while loading is loaded whole instead.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layout import find_heads
from .build_model import load_gguf, load_whole, read_config, skeleton
from .match import moved, prefixes
from .tensor_files import FLOATS, TensorFiles, TensorInfo, main_file
from .weights import ModelWeights, Weights


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
    main = main_file(path) if path.is_dir() else path
    if main.suffix == ".gguf" and main.is_file():
        return ModelWeights(load_gguf(main), path.name)
    files = TensorFiles(path)
    return Checkpoint(path, files, skeleton(read_config(path, config, like), path))


class Checkpoint:
    """Streamed weights; see `Weights`.

    Args:
        model: the checkpoint's model on the meta device.
    """

    def __init__(self, path: Path, files: TensorFiles, model: nn.Module) -> None:
        self.path, self.files, self.model = path, files, model
        self.name = path.resolve().name
        self.model_type = model.config.model_type
        self.layout = find_heads(model)
        self._shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        self.names = tuple(self._shapes)
        self._keys: dict[str, str] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._whole: ModelWeights | None = None

    @property
    def in_memory(self) -> bool:
        return self._whole is not None

    def prepare(self, names: Iterable[str], *, exact: bool = False) -> None:
        """Find the tensor of every parameter and check its shape and dtype; stored bytes are always exact.

        Raises:
            FileNotFoundError: a shard is missing.
            ValueError: a tensor is missing, quantised, or of another shape; it names tensor and file.
        """
        params = list(names)
        known, converted = renamed(self.model, self.files.files)
        _add_tied(self.model, known)
        if converted and not set(params) <= set(known):
            what, unit = (("some weights", "tensor") if set(self.layout.shapes) <= set(known) else
                          ("its attention weights", "layer"))
            warnings.warn(f"{self.name}: transformers converts {what} while loading, so the whole model is loaded "
                          f"instead of one {unit} at a time", stacklevel=4)
            self._keys = {name: known[name][0] for name in params if len(known.get(name, ())) == 1}
            self._whole = ModelWeights(load_whole(self.path, self.model, params), self.name)
            return self._whole.prepare(params)
        self._keys = self._resolve(params, known)
        stored = self.files.describe(self._keys.values())
        for name, key in self._keys.items():
            found, file = stored[key], self.files.files[key]
            if found.dtype not in FLOATS:
                raise ValueError(f"{key} in {file} is stored as {found.dtype}: it is quantised or packed; expected "
                                 "floating-point weights of 16 bits or more (dequantise the checkpoint first)")
            if found.shape != self._shapes[name]:
                raise ValueError(f"{key} in {file} has shape {list(found.shape)}; the config makes it "
                                 f"{list(self._shapes[name])}")
            self._infos[name] = found

    def info(self, name: str) -> TensorInfo:
        return self._infos[name] if self._whole is None else self._whole.info(name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        if self._whole is not None:
            return self._whole.read(names)
        keys = {self._keys[name]: name for name in names}
        return {keys[key]: tensor for key, tensor in self.files.read(keys).items()}

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
        found = known if set(params) <= set(known) else self._with_prefix(params, known)
        for name in params:
            if len(found[name]) > 1:
                raise ValueError(f"{self.path}: {' and '.join(found[name])} could both be {name}")
        return {name: found[name][0] for name in params}

    def _with_prefix(self, params: list[str], known: Mapping[str, list[str]]) -> dict[str, list[str]]:
        pairs = {prefixes(params[0], name) for name in known}
        counts = {pair: sum(moved(name, pair) in known for name in params) for pair in pairs}
        fitting = [pair for pair, count in counts.items() if count == len(params)]
        if len(fitting) > 1:
            candidates = sorted(moved(params[0], pair) for pair in fitting)
            raise ValueError(f"{self.path}: cannot tell which tensor is {params[0]}; "
                             f"it could be {', '.join(candidates)}")
        if fitting:
            return {name: known[moved(name, fitting[0])] for name in params}
        # Named as it would be under the prefix that explains most of the others.
        best = max(counts, key=counts.__getitem__, default=("", ""))
        best = best if 2 * counts.get(best, 0) > len(params) else ("", "")
        missing = [moved(name, best) or name for name in params if moved(name, best) not in known]
        quantised = getattr(self.model.config, "quantization_config", None)
        raise ValueError(f"{self.files.path} does not hold {missing[0]}"
                         + (f" nor {len(missing) - 1} more attention tensors" if missing[1:] else "")
                         + ("; its config says that the weights are quantised, and scores need floating-point ones"
                            if quantised else
                            f"; it holds {len(self.files.files)} tensors like {min(self.files.files)}"))


def _add_tied(model: nn.Module, known: dict[str, list[str]]) -> None:
    """A weight tied to another is stored once: under whichever name, it is found under all of them."""
    params = dict(model.named_parameters(remove_duplicate=False))
    stored = {id(param): known[name] for name, param in reversed(params.items()) if name in known}
    for name, param in params.items():
        if id(param) in stored:
            known.setdefault(name, stored[id(param)])


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
        if pattern is None:
            found.setdefault(name, []).append(key)
        converted |= pattern is not None
    return found, converted
