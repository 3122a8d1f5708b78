"""Files of scores, .json or .safetensors: writing them whole, reading them with suspicion."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensors import MAX_JSON_BYTES, read_json, write_atomic, write_json

FORMAT, VERSION = "alps_kernels.scores", 1
ENTRIES = {
    "metric": str, "representation": str, "temperature": (int, float), "layers": list, "heads_per_layer": list,
    "summary": (list, type(None)), "provenance": (dict, type(None)),
}


def write(path: str | os.PathLike, values: Tensor, entries: dict[str, Any]) -> None:
    """Write float64 scores and the entries of `ENTRIES` atomically; the suffix decides how.

    Raises:
        ValueError: the suffix is neither .json nor .safetensors.
    """
    document = {"format": FORMAT, "version": VERSION, **entries}
    if _suffix(path) == ".json":
        write_json(path, {**document, "values": values.tolist()})
    else:
        from safetensors.torch import save

        write_atomic(path, save({"scores": values}, {FORMAT: json.dumps(document, allow_nan=False)}))


def read(path: str | os.PathLike) -> dict[str, Any]:
    """The document that `write` wrote; `checked` takes it apart.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is torn or foreign; the message names the file.
    """
    return read_json(path, FORMAT, VERSION) if _suffix(path) == ".json" else _read_safetensors(path)


def checked(document: dict[str, Any]) -> tuple[Tensor | list, dict[str, Any]]:
    """Scores and entries of a document.

    Raises:
        KeyError, TypeError, ValueError: it lacks an entry, or one cannot be.
    """
    for name, kind in ENTRIES.items():
        if not isinstance(document[name], kind) or isinstance(document[name], bool):
            raise TypeError(f"{name} is {type(document[name]).__name__}")
    if not 0 < document["temperature"] < math.inf:
        raise ValueError(f"temperature is {document['temperature']}")
    values = document["values"]
    if isinstance(values, list) and not all(type(value) in (int, float) for value in values):
        raise TypeError("values are not all numbers")
    return values, {name: document[name] for name in ENTRIES}


def _suffix(path: str | os.PathLike) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".json", ".safetensors"):
        raise ValueError(f"{os.fspath(path)} ends in {suffix!r}; scores are written as .json or .safetensors")
    return suffix


def _read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    size = Path(path).stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{os.fspath(path)} has {size} bytes; a file of scores has at most {MAX_JSON_BYTES}")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError("its metadata hold no scores")
            found = document.get("version")
            if type(found) is not int or not 1 <= found <= VERSION:
                raise ValueError(f"it has schema version {found!r}; this alps_kernels reads 1 to {VERSION}")
            values = file.get_tensor("scores")
            if values.dtype != torch.float64:
                raise ValueError(f"its scores are {values.dtype}, not float64")
            return {**document, "values": values}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not a {FORMAT} file: {error}") from error
