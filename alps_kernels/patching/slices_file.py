"""Rows or columns of tensors in a safetensors file, whose header says which.

A JSON document in the file's header names every tensor's cut and the digest of its values: what is
read is what was written, or it is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..tensors import Ranges, blocks, complement, matrix_shape, merge, refuse_constant, save_tensors
from ..weights import TensorInfo

HASHERS = 4  # threads; hashlib lets go of the interpreter while it works
T = TypeVar("T")


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the tensors' bytes, one behind the other, each row-major."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(raw(tensor))
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
        return matrix_shape(self.shape)

    @property
    def info(self) -> TensorInfo:
        """What the whole tensor is."""
        return TensorInfo(self.shape, self.dtype)

    @property
    def stored(self) -> tuple[int, int]:
        """Rows and columns of the part: its ranges one behind the other along `dim`."""
        size = sum(stop - start for start, stop in self.ranges)
        rows, columns = self.matrix
        return (size, columns) if self.dim == 0 else (rows, size)

    @torch.no_grad()
    def take(self, tensor: Tensor) -> Tensor:
        """The part of `tensor`, a copy of shape `stored`."""
        return torch.cat(blocks(tensor, self.dim, self.ranges), self.dim).contiguous()

    @torch.no_grad()
    def put(self, values: Tensor, tensor: Tensor) -> None:
        """Write `values`, of shape `stored`, to their places in `tensor`."""
        sizes = [stop - start for start, stop in self.ranges]
        parts = values.split(sizes, self.dim)
        for block, part in zip(blocks(tensor, self.dim, self.ranges), parts, strict=True):
            block.copy_(part)

    def rest(self, tensor: Tensor) -> list[Tensor]:
        """What the ranges leave of `tensor`, as views."""
        return blocks(tensor, self.dim, complement(self.ranges, self.matrix[self.dim]))

    def __str__(self) -> str:
        return f"{'columns' if self.dim else 'rows'} {[list(span) for span in self.ranges]}"

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "dim": self.dim,
                "ranges": [list(span) for span in self.ranges]}

    @classmethod
    def from_json(cls, document: Any) -> TensorSlice:
        """Raises ValueError where the document is no cut of a tensor that can be."""
        if not isinstance(document, dict):
            raise ValueError("its entry is not an object")
        info = read_info(document.get("shape"), document.get("dtype"))
        dim, ranges = document.get("dim"), document.get("ranges")
        if type(dim) is not int or dim not in (0, 1):
            raise ValueError(f"dim is {dim!r}; expected 0 or 1")
        if not isinstance(ranges, list) or not all(isinstance(span, list) and len(span) == 2
                                                   and all(type(edge) is int for edge in span) for span in ranges):
            raise ValueError("ranges is not a list of [start, stop]")
        ranges = tuple((start, stop) for start, stop in ranges)
        cut = cls(*info, dim, ranges)
        if not ranges or merge(ranges) != ranges or ranges[0][0] < 0 or ranges[-1][1] > cut.matrix[dim]:
            raise ValueError(f"ranges {list(map(list, ranges))} do not cut dimension {dim} of {list(cut.shape)} "
                             "into sorted, separate pieces")
        return cut


def read_info(shape: Any, dtype: Any) -> TensorInfo:
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"shape is {shape!r}; expected a list of sizes")
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}; expected one of torch's")
    return TensorInfo(tuple(shape), dtype)


def read_digest(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not a SHA-256 digest")
    return value


def write_slices_file(path: str | os.PathLike, format: str, document: Mapping[str, Any],
                      cuts: Mapping[str, TensorSlice], values: Mapping[str, Tensor],
                      **digests: Mapping[str, str]) -> dict[str, Any]:
    """Write slices and a document about them in one atomic step.

    Args:
        document: what else to say; "format", "version" and "tensors" are this function's.
        digests: further ones of the tensors, under the entry's name.

    Returns:
        the whole document in the file's header.

    Raises:
        OSError: the file cannot be written; what was there is untouched.
        TypeError, ValueError: the document is not JSON.
    """
    digests = {"values": {name: digest(values[name]) for name in cuts}, **digests}
    tensors = {name: {**cut.to_json(), **{entry: held[name] for entry, held in digests.items() if name in held}}
               for name, cut in cuts.items()}
    document = {**document, "format": format, "version": 1, "tensors": tensors}
    text = json.dumps(document, allow_nan=False)
    save_tensors(path, {name: values[name].cpu() for name in cuts}, {format: text})
    return document


@contextmanager
def read_slices_file(path: str | os.PathLike,
                     format: str) -> Iterator[tuple[dict[str, Any], dict[str, TensorSlice], dict[str, Tensor]]]:
    """Read what `write_slices_file` wrote: the document, cuts and values.

    The block raises ValueError where they contradict each other.

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
            if odd := sorted(cuts.keys() ^ file.keys()):
                raise ValueError(f"the tensor {odd[0]!r} is missing" if odd[0] in cuts else
                                 f"it holds the tensor {odd[0]!r}, which its header does not list")
            values = {name: _values(file, name, cut, document["tensors"][name]) for name, cut in cuts.items()}
        yield document, cuts, values
    except (SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} is not a valid {format} file: {' '.join(str(error).split())}") from error


def _document(text: str | None, format: str) -> dict[str, Any]:
    if text is None:
        raise ValueError("its header does not say that it is one")
    document = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=_once)
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
    dtype = TensorInfo.of(values).dtype
    if dtype != cut.dtype:
        raise ValueError(f"{name} is {dtype}; its header says {cut.dtype}")
    if digest(values) != entry.get("values"):
        raise ValueError(f"the values of {name} are not those that were written (damaged or changed)")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
