"""Tile, pointer and hyperparameter tables of the AdamW kernel; `csrc_triton.head_adamw` names the same columns."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...tensors import as_matrix
from .param_update import Block, HyperRow, ParamUpdate
from .quantize8 import QUANTUM

TILE = 1024  # elements: 8 for each thread of 4 warps
VECTOR = 8  # elements: 16 bytes of a 16-bit type
ROOT2 = HyperRow._fields.index("root2")


class Tile(NamedTuple):
    """A row of the work list: `limit` elements of a rectangle, row after row; all counts in elements.

    Element k lies in row (first + k) // width and column (first + k) % width; the offsets are
    those of row 0 and column 0 in param, grad, state and weight copy. A flat run is one row.
    """

    param: int
    hyper: int
    p_off: int
    g_off: int
    s_off: int
    p_stride: int
    g_stride: int
    s_stride: int
    first: int
    width: int
    limit: int
    scale: int  # the first of its scales
    copy_off: int
    copy_stride: int


LENGTHS = [i for i, name in enumerate(Tile._fields) if name not in ("param", "hyper", "scale")]


class Pointers(NamedTuple):
    """A row of the pointer table: addresses, 0 for none; then its first row of hyperparameters, stream and seed."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    max_exp_avg_sq: int
    low: int
    exp_avg_scale: int
    exp_avg_sq_scale: int
    weight_copy: int
    hyper: int
    stream: int
    seed: int


LOWEST = 0 if sys.byteorder == "little" else 7
SIXTEENS = bytes(range(0, 256, 16))
GRAD_COLUMN = Pointers._fields.index("grad")
WIDE = [i for i, name in enumerate(Pointers._fields[:9]) if not name.endswith("scale")]  # read 16 bytes at a time


def tiles_of(update: ParamUpdate, param: int) -> Tensor:
    """The tiles of one parameter, int64 [n, len(Tile)]."""
    whole = update.param.numel()
    if update.blocks is None:
        return _tiles(Tile(param, 0, 0, 0, 0, 0, 0, 0, 0, whole, 0, 0, 0, 0), 1, whole)
    pieces = []
    n_rows, n_cols = as_matrix(update.param).shape
    strides = [as_matrix(update.param).stride(0), as_matrix(update.grad).stride(0)]
    copy_stride = 0 if update.weight_copy is None else as_matrix(update.weight_copy).stride(0)
    for block in update.blocks:
        starts = [_start(block, stride) for stride in strides]
        copy_start = 0 if update.weight_copy is None else _start(block._replace(start=block.copy_start), copy_stride)
        size = block.stop - block.start
        height, width = (size, n_cols) if block.dim == 0 else (n_rows, size)
        if {*strides, block.stride, copy_stride or width} == {width} or height == 1:
            height, width = 1, height * width
        pieces.append(_tiles(Tile(param, block.span if update.n_rows > 1 else 0, *starts, block.offset, *strides,
                                  block.stride, 0, width, 0, block.scale, copy_start, copy_stride), height, width))
    return torch.cat(pieces) if pieces else torch.empty(0, len(Tile._fields), dtype=torch.int64, device="cpu")


def _start(block: Block, stride: int) -> int:
    return block.start * (stride if block.dim == 0 else 1)


def _tiles(first: Tile, height: int, width: int) -> Tensor:
    """The tiles of a rectangle whose row 0 and column 0 lie where `first` says."""
    n = height * width
    at = torch.arange(0, n, TILE, dtype=torch.int64, device="cpu")
    tiles = {name: torch.full_like(at, value) for name, value in first._asdict().items()}
    for name in ("p", "g", "s", "copy"):
        tiles[f"{name}_off"] += at if height == 1 else at // max(width, 1) * tiles[f"{name}_stride"]
    if height == 1:  # tiles of one row each: strides and width mean nothing
        for name in ("p_stride", "g_stride", "s_stride", "copy_stride", "width"):
            tiles[name].fill_(TILE)
    else:
        tiles["first"] = at % max(width, 1)
    tiles["limit"] = (n - at).clamp(max=TILE)
    tiles["scale"] += at // QUANTUM
    return torch.stack([tiles[name] for name in Tile._fields], 1)


def pointers_of(update: ParamUpdate, seed: int) -> Pointers:
    tensors = (update.param, update.grad, update.exp_avg, update.exp_avg_sq, update.max_exp_avg_sq, update.low,
               *(update.scales or (None, None)), update.weight_copy)
    return Pointers(*(0 if t is None else t.data_ptr() for t in tensors), update.row, update.stream,
                    seed - 2**64 * (seed >= 2**63))


def with_grads(pointers: array, grads: array) -> array:
    """A pointer table, row after row, with other addresses of gradients."""
    moved = pointers[:]
    moved[GRAD_COLUMN::len(Pointers._fields)] = grads
    return moved


def aligned(tiles: Tensor, pointers: Sequence[int]) -> bool:
    """Every access of these tiles may be 16 bytes wide."""
    return at_16(array("q", [pointers[i] for i in WIDE])) and not bool((tiles[:, LENGTHS] % VECTOR).any())


def at_16(addresses: array) -> bool:
    """All of them are multiples of 16: their lowest bytes tell."""
    return not addresses.tobytes()[LOWEST::8].translate(None, SIXTEENS)


def padded(tiles: Tensor, *counts: int) -> Tensor:
    """The work list with tiles of nothing at its end, so that programs of any of these numbers of tiles find theirs."""
    nothing = torch.tensor([Tile(*[0] * len(Tile._fields))._replace(width=TILE)], dtype=torch.int64, device="cpu")
    return torch.cat([tiles, nothing.expand(-len(tiles) % math.lcm(*counts), -1)])


def packed(rows: Sequence[HyperRow]) -> list[float]:
    """The hyperparameter table, row after row, as the kernel reads it: with the inverse of root2."""
    return [x for row in rows for x in (*row[:ROOT2], 1 / row[ROOT2], *row[ROOT2 + 1:])]
