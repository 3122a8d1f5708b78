"""Named tensors in the files of a checkpoint, read a few at a time."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# In the order in which transformers looks for them.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Stored:
    """What a file says of one tensor: its shape, and its dtype in torch's word where it has one."""

    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a checkpoint folder, of one file, or of the shards that an index lists.

    A file is opened for every read and let go after it, so that no page of it stays mapped.
    Pickles are only read with `weights_only=True`.

    Attributes:
        files: for every tensor the file it is in.
        folder: where the files are.

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
        self.path = _main_file(path) if path.is_dir() else path
        self.folder = self.path.parent
        if self.path.suffix == ".json":
            self.files = _read_index(self.path)
        else:
            with self._opened(self.path) as source:
                self.files = {key: self.path for key in source.keys()}

    def describe(self, keys: Iterable[str]) -> dict[str, Stored]:
        """Shape and dtype of these tensors; their values are not read."""
        found = {}
        for file, names in self._by_file(keys).items():
            with self._opened(file) as source:
                found.update({name: source.describe(name) for name in names})
        return found

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU."""
        found = {}
        for file, names in self._by_file(keys).items():
            with self._opened(file) as source:
                found.update({name: source.read(name) for name in names})
        return found

    def _by_file(self, keys: Iterable[str]) -> dict[Path, list[str]]:
        grouped = defaultdict(list)
        for key in keys:
            grouped[self.files[key]].append(key)
        for file, names in grouped.items():
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing; {self.path.name} says it holds {names[0]}"
                                        + (f" and {len(names) - 1} more tensors" if names[1:] else ""))
        return grouped

    @contextmanager
    def _opened(self, file: Path) -> Iterator[_Safetensors | _Pickle]:
        if file.suffix in PICKLES:
            # The old pickle format cannot be mapped: it is read once, whole.
            tensors = self._kept.get(file)
            if tensors is None:
                tensors = _load_pickle(file)
                if not zipfile.is_zipfile(file):
                    self._kept[file] = tensors
            yield _Pickle(file, tensors)
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt", device="cpu") as source:
                yield _Safetensors(file, source)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


class _Safetensors:
    _DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

    def __init__(self, file: Path, source) -> None:
        self.file, self.source = file, source
        self.held = set(source.keys())

    def keys(self) -> Iterable[str]:
        return self.held

    def describe(self, key: str) -> Stored:
        part = self.source.get_slice(_held(self, key))
        return Stored(tuple(part.get_shape()), self._DTYPES.get(part.get_dtype(), part.get_dtype()))

    def read(self, key: str) -> Tensor:
        return self.source.get_tensor(_held(self, key))


class _Pickle:
    def __init__(self, file: Path, tensors: dict[str, Tensor]) -> None:
        self.file, self.held = file, tensors

    def keys(self) -> Iterable[str]:
        return self.held

    def describe(self, key: str) -> Stored:
        tensor = self.held[_held(self, key)]
        return Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def read(self, key: str) -> Tensor:
        return self.held[_held(self, key)].detach()


def _held(source: _Safetensors | _Pickle, key: str) -> str:
    if key not in source.held:
        raise ValueError(f"{source.file} does not hold {key}, though the checkpoint's index says so")
    return key


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


def _main_file(folder: Path) -> Path:
    """The index or single file that holds the weights of a checkpoint folder."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model; merge it into its base model first")
    safetensors_first = (INDEXES[0], SINGLES[0], INDEXES[1], SINGLES[1])
    for name in safetensors_first:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf", *PICKLES))
    if len(found) == 1:
        return folder / found[0]
    raise ValueError(f"{folder} holds no checkpoint: expected {', '.join(safetensors_first)} or one .gguf; "
                     f"there is {found or 'nothing of the kind'}")


def _read_index(path: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files = {key: path.parent / name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not an index of shards: it has no weight_map from tensor to file") from error
    for key, file in files.items():
        if file.parent != path.parent or file.suffix not in (".safetensors", *PICKLES):
            raise ValueError(f"{path} says that {key} is in {weight_map[key]!r}; expected a file of tensors beside it")
    return files
