"""Moments in 8 bits: fourth roots on an even grid, a float32 scale for each 64 elements of a block.

    x ~ sign(code) (|code| scale)^4

The fourth root spends the codes evenly over a block's magnitudes: 8-bit `exp_avg` reaches down to
4e-9 of the block's largest element, `exp_avg_sq` to 2e-10. With a that largest element, the
fourth root of what is decoded is off by at most

    exp_avg     a^(1/4) / 254, to the nearest code
    exp_avg_sq  a^(1/4) / 255, to one of the two neighbours at random with the true value as mean,
                since to nearest it would stall at beta2 = 0.999; 0 is kept for 0 alone

and the largest element itself is exact but for roundings of float32. A NaN or an infinity makes
its 64 elements NaN or infinite.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTUM = 64  # elements that share a scale
SIGNED, UNSIGNED = 127, 255


def n_scales(numel: int) -> int:
    """How many scales the codes of a block of so many elements have."""
    return -(-numel // QUANTUM)


def decode8(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 or uint8 codes of one block, any shape, and its scales [ceil(n / 64)] -> float32 of that shape."""
    code = _rows(codes.float())
    square = (code * scales[:, None]).square_()
    return _unrowed(torch.copysign(square.square_(), code), codes)


def encode8(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of one block -> int8 codes of its shape, to nearest, and scales [ceil(n / 64)]."""
    code, scale = _scaled(_rows(x.abs()), SIGNED)
    code.round_().clamp_(max=SIGNED)
    return _unrowed(code, x).copysign_(x).nan_to_num(nan=0.0).to(torch.int8), scale[:, 0]


def encode8_stochastically(x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 >= 0 of one block -> uint8 codes of its shape, and scales [ceil(n / 64)].

    Args:
        bits: whole numbers from 0 to 65535, of the shape of `x`; None: to nearest.
    """
    rows = _rows(x)
    code, scale = _scaled(rows, UNSIGNED)
    if bits is None:
        code.round_().clamp_(max=UNSIGNED)
    else:
        code.floor_().clamp_(max=UNSIGNED - 1)
        low, high = ((c * scale).square_().square_() for c in (code, code + 1))
        code += (rows - low) * 65536 > _rows(bits.float()) * (high - low)
    code = torch.where(rows > 0, code.clamp_(min=1), 0.0)
    return _unrowed(code, x).nan_to_num(nan=0.0).to(torch.uint8), scale[:, 0]


def _rows(x: Tensor) -> Tensor:
    """[ceil(n / 64), 64], the last row filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)


def _unrowed(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1)[:like.numel()].view(like.shape)


def _scaled(rows: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Fourth roots in units of their scales, and the scales, [n, 1]: infinite where one of the 64 is NaN."""
    root = rows.sqrt().sqrt_()
    scale = root.nan_to_num(nan=float("inf"), posinf=float("inf")).amax(1, keepdim=True) / codes
    return root * (1 / scale.clamp_min(1e-30)), scale
