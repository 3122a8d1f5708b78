"""Some rows or columns of some tensors, in a safetensors file that says which.

A JSON document in the file's header names every tensor's cut and the digest of its values: what is
read is what was written, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tensors import Ranges, as_matrix, complement, merge, replacing

HASHERS = 4  # threads; hashlib lets go of the interpreter while it works
DIGEST = re.compile("[0-9a-f]{64}")
T = TypeVar("T")


def digest(*blocks: Tensor) -> str:
    """SHA-256 of the blocks' bytes, one behind the other, each row-major."""
    total = hashlib.sha256()
    for block in blocks:
        total.update(raw(block))
    return total.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def in_threads(function: Callable[[str], T], names: Iterable[str]) -> dict[str, T]:
    """`function` of every name, a few at a time."""
    names = list(names)
    with ThreadPoolExecutor(min(HASHERS, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorSlice:
    """Which part of one tensor.

    Attributes:
        shape, dtype: of the whole tensor; the dtype in torch's word.
        dim: the axis that is cut, 0 rows or 1 columns of the tensor seen as [shape[0], -1].
        ranges: half-open, along `dim`, sorted, disjoint, adjacent ones merged.
    """

    shape: tuple[int, ...]
    dtype: str
    dim: int
    ranges: Ranges

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the whole tensor as a matrix."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the part: its ranges one behind the other along `dim`."""
        size = sum(stop - start for start, stop in self.ranges)
        rows, columns = self.matrix
        return (size, columns) if self.dim == 0 else (rows, size)

    @torch.no_grad()
    def take(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, a copy of shape `stored`."""
        return torch.cat(self.blocks(tensor), self.dim).contiguous()

    def blocks(self, tensor: Tensor) -> list[Tensor]:
        """The ranges as views of `tensor`."""
        return [as_matrix(tensor).narrow(self.dim, start, stop - start) for start, stop in self.ranges]

    @torch.no_grad()
    def put(self, values: Tensor, tensor: Tensor) -> None:
        """Write `values`, of shape `stored`, to their places in `tensor`."""
        sizes = [stop - start for start, stop in self.ranges]
        for block, part in zip(self.blocks(tensor), values.split(sizes, self.dim), strict=True):
            block.copy_(part)

    def rest(self, tensor: Tensor) -> list[Tensor]:
        """What the ranges leave of `tensor`, as views."""
        return [as_matrix(tensor).narrow(self.dim, start, stop - start)
                for start, stop in complement(self.ranges, self.matrix[self.dim])]

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "dim": self.dim,
                "ranges": [list(span) for span in self.ranges]}

    @classmethod
    def from_json(cls, document: Any) -> TensorSlice:
        """Raises ValueError where the document is no cut of a tensor that can be."""
        if not isinstance(document, dict):
            raise ValueError("its entry is not an object")
        shape, dtype = read_shape(document.get("shape")), read_dtype(document.get("dtype"))
        dim, ranges = document.get("dim"), document.get("ranges")
        if type(dim) is not int or dim not in (0, 1):
            raise ValueError(f"dim is {dim!r}; expected 0 or 1")
        if not isinstance(ranges, list) or not all(
                isinstance(span, list) and len(span) == 2 and all(type(edge) is int for edge in span) for span in ranges):
            raise ValueError("ranges is not a list of [start, stop]")
        ranges = tuple((start, stop) for start, stop in ranges)
        cut = cls(shape, dtype, dim, ranges)
        if not ranges or merge(ranges) != ranges or ranges[0][0] < 0 or ranges[-1][1] > cut.matrix[dim]:
            raise ValueError(f"ranges {list(map(list, ranges))} do not cut dimension {dim} of {list(shape)} "
                             "into sorted, separate pieces")
        return cut


def read_shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in value):
        raise ValueError(f"shape is {value!r}; expected a list of sizes")
    return tuple(value)


def read_dtype(value: Any) -> str:
    if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
        raise ValueError(f"dtype is {value!r}; expected one of torch's")
    return value


def read_digest(value: Any) -> str:
    if not isinstance(value, str) or not DIGEST.fullmatch(value):
        raise ValueError(f"{value!r} is not a SHA-256 digest")
    return value


def write_slices(path: str | os.PathLike, format: str, document: Mapping[str, Any], cuts: Mapping[str, TensorSlice],
                 values: Mapping[str, Tensor], more: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Write slices and a document about them in one atomic step.

    Args:
        document: what else to say; "format", "version" and "tensors" are this function's.
        more: further entries for the tensors.

    Raises:
        OSError: the file cannot be written; what was there is untouched.
        TypeError, ValueError: the document is not JSON.
    """
    tensors = {name: {**cut.to_json(), "values": digest(values[name]), **(more or {}).get(name, {})}
               for name, cut in cuts.items()}
    text = json.dumps({**document, "format": format, "version": 1, "tensors": tensors}, allow_nan=False)
    with replacing(path) as temporary:
        save_tensors({name: values[name].cpu() for name in cuts}, temporary, {format: text})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; what goes wrong is an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def read_slices(path: str | os.PathLike, format: str) -> tuple[dict[str, Any], dict[str, TensorSlice], dict[str, Tensor]]:
    """The document, cuts and values that `write_slices` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn, foreign or contradicts itself; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file; expected one that holds {format}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            document = _document((file.metadata() or {}).get(format), format)
            cuts = {name: _cut(name, entry) for name, entry in document["tensors"].items()}
            stored = set(file.keys())
            if stored != set(cuts):
                odd = sorted(stored ^ set(cuts))[0]
                raise ValueError(f"it holds the tensor {odd!r}, which its header does not list" if odd in stored
                                 else f"the tensor {odd!r} is missing")
            values = {name: _values(file, name, cut, document["tensors"][name]) for name, cut in cuts.items()}
    except (SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not a valid {format} file: {' '.join(str(error).split())}") from error
    return document, cuts, values


def _document(text: str | None, format: str) -> dict[str, Any]:
    if text is None:
        raise ValueError("its header does not say that it is one")
    document = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    if not isinstance(document, dict) or document.get("format") != format:
        raise ValueError("its header's format is another")
    if type(document.get("version")) is not int or document["version"] != 1:
        raise ValueError(f"it has schema version {document.get('version')!r}; this alps_kernels reads version 1")
    if not isinstance(document.get("tensors"), dict):
        raise ValueError("its header lists no tensors")
    return document


def _cut(name: str, entry: Any) -> TensorSlice:
    try:
        return TensorSlice.from_json(entry)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _values(file: Any, name: str, cut: TensorSlice, entry: Mapping[str, Any]) -> Tensor:
    shape = tuple(file.get_slice(name).get_shape())
    if shape != cut.stored:
        raise ValueError(f"{name} has shape {list(shape)}; its ranges make it {list(cut.stored)}")
    values = file.get_tensor(name).clone()  # what is checked here must not be the file, which may change
    if dtype_name(values.dtype) != cut.dtype:
        raise ValueError(f"{name} is {dtype_name(values.dtype)}; its header says {cut.dtype}")
    if digest(values) != entry.get("values"):
        raise ValueError(f"the values of {name} are not those that were written (damaged or changed)")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON allows")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
