"""The tables of the AdamW kernel: which tile is whose, where everything lies, and the step's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .updates import Block, Hyper, Update, matrix

ROWS, COLS = 16, 64  # of a tile: 1,024 elements, 8 for each thread of 4 warps
VECTOR = 8  # elements: 16 bytes of a 16-bit type
ROOT2 = Hyper._fields.index("root2")


class Tile(NamedTuple):
    """A row of the work list: a rectangle of at most [ROWS, COLS] elements, all counts in elements.

    A flat run is a rectangle of COLS columns whose strides are COLS and whose last row may end
    early. Offsets count from the first element of param, grad and state.
    """

    param: int
    hyper: int
    p_off: int
    g_off: int
    s_off: int
    p_stride: int
    g_stride: int
    s_stride: int
    n_cols: int
    limit: int  # elements row * COLS + col at and beyond it do not exist


def tiles_of(update: Update, param: int, hyper: int) -> Tensor:
    """The tiles of one parameter, int64 [n, len(Tile)]; `hyper` is the number of its first row of numbers."""
    if update.blocks is None:
        return _flat(Tile(param, hyper, 0, 0, 0, COLS, COLS, COLS, COLS, 0), update.param.numel())
    pieces = []
    p_stride, g_stride = matrix(update.param).stride(0), matrix(update.grad).stride(0)
    n_rows, n_cols = matrix(update.param).shape
    for index, block in enumerate(update.blocks):
        row = hyper + (index if update.n_hypers > 1 else 0)
        if block.dim == 0 and p_stride == g_stride == block.stride == n_cols:
            start = block.start * n_cols
            first = Tile(param, row, start, start, block.offset, COLS, COLS, COLS, COLS, 0)
            pieces.append(_flat(first, (block.stop - block.start) * n_cols))
        else:
            pieces.append(_rectangles(block, param, row, p_stride, g_stride, n_rows, n_cols))
    return torch.cat(pieces) if pieces else torch.empty(0, len(Tile._fields), dtype=torch.int64)


def _flat(first: Tile, n: int) -> Tensor:
    at = torch.arange(0, n, ROWS * COLS, dtype=torch.int64)
    tiles = torch.tensor(first, dtype=torch.int64).repeat(len(at), 1)
    tiles[:, 2:5] += at[:, None]
    tiles[:, 9] = (n - at).clamp(max=ROWS * COLS)
    return tiles


def _rectangles(block: Block, param: int, hyper: int, p_stride: int, g_stride: int, n_rows: int, n_cols: int) -> Tensor:
    (top, left), height, width = ((block.start, 0), block.stop - block.start, n_cols) if block.dim == 0 else (
        (0, block.start), n_rows, block.stop - block.start)
    at = torch.cartesian_prod(torch.arange(0, height, ROWS), torch.arange(0, width, COLS)).view(-1, 2)
    down, right = at[:, 0], at[:, 1]
    columns = {
        "param": torch.full_like(down, param), "hyper": torch.full_like(down, hyper),
        "p_off": (top + down) * p_stride + left + right, "g_off": (top + down) * g_stride + left + right,
        "s_off": block.offset + down * block.stride + right,
        "p_stride": torch.full_like(down, p_stride), "g_stride": torch.full_like(down, g_stride),
        "s_stride": torch.full_like(down, block.stride),
        "n_cols": (width - right).clamp(max=COLS), "limit": (height - down).clamp(max=ROWS) * COLS,
    }
    return torch.stack([columns[name] for name in Tile._fields], 1)


def pointers_of(update: Update, seed: int) -> tuple[int, ...]:
    """A row of the pointer table: addresses of param, grad, the moments and low; then stream and seed."""
    tensors = (update.param, update.grad, update.exp_avg, update.exp_avg_sq, update.max_exp_avg_sq, update.low)
    return (*(0 if t is None else t.data_ptr() for t in tensors), update.stream, seed - 2**64 * (seed >= 2**63))


def aligned(tiles: Tensor, pointers: Sequence[int]) -> bool:
    """Every access of these tiles may be 16 bytes wide."""
    return not any(p % 16 for p in pointers[:6]) and not bool((tiles[:, 2:] % VECTOR).any())


def numbers(hypers: Sequence[tuple[Hyper, ...] | Tensor]) -> Tensor:
    """The table of numbers, float32 [n, len(Hyper)]: as they are, but for the inverse of root2."""
    if isinstance(hypers[0], Tensor):
        table, which = torch.cat(list(hypers)), None
    else:  # most rows are one and the same object
        rows = [row for rows in hypers for row in rows]
        distinct = {id(row): row for row in rows}
        place = {key: i for i, key in enumerate(distinct)}
        table, which = torch.tensor(list(distinct.values()), dtype=torch.float64), [place[id(row)] for row in rows]
    table[:, ROOT2].reciprocal_()
    return table.float() if which is None else table.float()[which]
