"""Named tensors in the files of a checkpoint, read a few at a time."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# In the order in which transformers looks for them.
MAIN_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' word: torch's
FLOATS = tuple(DTYPES.values())  # dtypes whose values can be computed with
T = TypeVar("T")


class TensorInfo(NamedTuple):
    """The shape of a tensor, and its dtype in torch's word where that has one."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class TensorFiles:
    """The tensors of a checkpoint folder, of one file, or of the shards that an index lists.

    A file is opened for every read and let go after it, so that no page of it stays mapped.
    Pickles are only read with `weights_only=True`.

    Attributes:
        files: for every tensor the file it is in.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it holds no checkpoint, or one that cannot be read; it names the file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; expected a checkpoint folder or file (models of a hub "
                                    "have to be downloaded first)")
        self._kept: dict[Path, dict[str, Tensor]] = {}
        self.path = main_file(path) if path.is_dir() else path
        if self.path.suffix == ".json":
            self.files = _read_index(self.path)
        else:
            with self._opened(self.path) as source:
                self.files = dict.fromkeys(source.keys(), self.path)

    def describe(self, keys: Iterable[str]) -> dict[str, TensorInfo]:
        """Shape and dtype of these tensors; their values are not read."""
        return self._each(keys, _described)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU."""
        return self._each(keys, _value)

    def _each(self, keys: Iterable[str], what: Callable[[Any, str], T]) -> dict[str, T]:
        grouped, found = defaultdict(list), {}
        for key in keys:
            grouped[self.files[key]].append(key)
        for file, names in grouped.items():
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; {self.path.name} says it holds {names[0]}"
                                        + (f" and {len(names) - 1} more tensors" if names[1:] else ""))
        for file, names in grouped.items():
            with self._opened(file) as source:
                held = set(source.keys())
                if absent := [name for name in names if name not in held]:
                    raise ValueError(f"{file} does not hold {absent[0]}, though the checkpoint's index says so")
                found.update({name: what(source, name) for name in names})
        return found

    @contextmanager
    def _opened(self, file: Path) -> Iterator[Any]:
        """A file's tensors by name: a pickle's dict, or safetensors' handle."""
        if file.suffix in PICKLE_SUFFIXES:
            tensors = self._kept.get(file) or _load_pickle(file)
            if not zipfile.is_zipfile(file):  # the old pickle format cannot be mapped: it is read once, whole
                self._kept[file] = tensors
            yield tensors
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt", device="cpu") as source:
                yield source
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _described(source: Any, key: str) -> TensorInfo:
    if isinstance(source, dict):
        return TensorInfo.of(source[key])
    part = source.get_slice(key)
    return TensorInfo(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))


def _value(source: Any, key: str) -> Tensor:
    return source[key].detach() if isinstance(source, dict) else source.get_tensor(key)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file} cannot be read as a file of tensors (weights_only=True; pickles that run code are "
                         f"refused): {said[0]}") from error
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"{file} is not a dict of tensors by name, which a checkpoint is")
    return held


def main_file(folder: Path) -> Path:
    """The index or single file that holds the weights of a checkpoint folder."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model; merge it into its base model first")
    for name in MAIN_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf", *PICKLE_SUFFIXES))
    if len(found) == 1:
        return folder / found[0]
    raise ValueError(f"{folder} holds no checkpoint: expected {', '.join(MAIN_FILES)} or one .gguf; "
                     f"there is {found or 'nothing of the kind'}")


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {key: path.parent / name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of shards: it has no weight_map from tensor to file") from error
    for key, file in files.items():
        if file.parent != path.parent or file.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(f"{path} says that {key} is in {weight_map[key]!r}; "
                             "expected a file of tensors beside it")
    return files
