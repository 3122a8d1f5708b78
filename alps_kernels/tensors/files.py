"""Files and folders written in one atomic step, and JSON documents that are checked when read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .checks import refuse_constant

MAX_JSON_BYTES = 256 * 2**20


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` in one step if the block ends well.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; it names `path`, which is untouched.
    """
    path, temporary = Path(path), None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        os.close(handle)
        yield temporary
        sync(temporary)
        temporary.chmod(0o666 & ~_mask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error
        raise


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` in one step if the block ends well.

    Raises:
        FileExistsError: `path` is there and is not an empty folder.
        OSError: its parent is missing or not writable, or the disk is full; `path` is not made.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} is already there; expected a folder that is new or empty")
    temporary = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for file in (entry for entry in temporary.rglob("*") if entry.is_file()):
            sync(file)
        temporary.chmod(0o777 & ~_mask())
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(file: Path) -> None:
    """Have what was written to `file` on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | os.PathLike, document: dict[str, Any]) -> None:
    """Write a document as JSON in one atomic step; NaN and infinities are refused."""
    text = json.dumps(document, indent=1, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor],
                 metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one atomic step.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error


def read_json(path: str | os.PathLike, format: str, version: int) -> dict[str, Any]:
    """Read a JSON document that `write_json` wrote.

    Args:
        format: what its "format" must be.
        version: the newest schema version that the caller understands.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a document; the message names the file and what is wrong.
    """
    path = Path(path)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a {format} file has at most {MAX_JSON_BYTES}")
    try:
        document = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a {format} file: {error}") from error
    if not isinstance(document, dict) or document.get("format") != format:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path} is not a {format} file: its format is {found!r}")
    found = document.get("version")
    if type(found) is not int or not 1 <= found <= version:
        raise ValueError(f"{path} has schema version {found!r}; this alps_kernels reads 1 to {version}")
    return document
