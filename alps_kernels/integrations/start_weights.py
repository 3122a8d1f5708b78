"""The weights that a run started from: digested, read, restored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from safetensors import safe_open
from torch import Tensor

from ..selection import BoundSelection
from ..tensors import complement, intersect

START_FILE = "alps_start.safetensors"


@torch.no_grad()
def restore_start(warm: BoundSelection, kept: BoundSelection, start: Mapping[str, Tensor]) -> None:
    """Put back the bytes of `start` that `warm` trained and `kept` does not."""
    keep = {part.name: part.ranges for part in kept.params}
    for part in warm.params:
        if part.name in start:
            lost = replace(part, ranges=intersect(part.ranges, complement(keep.get(part.name, ()), part.extent)))
            for now, then in zip(lost.blocks(part.param), lost.blocks(start[part.name]), strict=True):
                now.copy_(then)


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_start(path: str, expected: str, warm: BoundSelection, home: Callable) -> dict[str, Tensor]:
    """The start weights of `path`, each on the device that `home` gives for its parameter.

    Raises:
        ValueError: the file cannot be read, or holds the start of another run.
    """
    parts = {part.name: part.param for part in warm.params}
    try:
        with safe_open(path, "pt") as file:
            start = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has an error of its own, OSError where there is no file
        raise ValueError(f"this run was saved before its heads were chosen, and {path} with the weights it began "
                         f"from cannot be read ({error}); resume with the output_dir of that run") from error
    if digest_of_tensors(start) != expected or any(name not in parts for name in start):
        raise ValueError(f"{path} does not hold the weights that this run began from; it is of another run")
    return {name: tensor.to(home(parts[name])) for name, tensor in start.items()}
