"""What the heads were when a run began: kept, digested, written, read, restored."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..selection import BoundParam, BoundSelection
from ..tensors import complement, merge, replacing

START_FILE = "alps_start.safetensors"


@torch.no_grad()
def restore(warm: BoundSelection, kept: BoundSelection, start: Mapping[str, Tensor]) -> None:
    """Put back the bytes of `start` that `warm` trained and `kept` does not."""
    keep = {part.name: part.ranges for part in kept.params}
    for part in warm.params:
        if part.name in start:
            stays = merge((*keep.get(part.name, ()), *complement(part.ranges, part.extent)))
            lost = BoundParam(part.name, part.param, part.dim, complement(stays, part.extent))
            for now, then in zip(lost.blocks(part.param), lost.blocks(start[part.name]), strict=True):
                now.copy_(then)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype};".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_start(path: str, expected: str, warm: BoundSelection, home: Callable) -> dict[str, Tensor]:
    parts = {part.name: part.param for part in warm.params}
    try:
        with safe_open(path, "pt") as file:
            start = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has an error of its own, OSError where there is no file
        raise ValueError(f"this run was saved before its heads were chosen, and {path} with the weights it began "
                         f"from cannot be read ({error}); resume with the output_dir of that run") from error
    if digest(start) != expected or any(name not in parts for name in start):
        raise ValueError(f"{path} does not hold the weights that this run began from; it is of another run")
    return {name: tensor.to(home(parts[name])) for name, tensor in start.items()}


def write_start(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Atomically, for `read_start`."""
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary)
