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

Codes are decided by fourth powers T(c) = ((c scale)^2)^2, three products of float32, so that no digit
of a root matters and every backend finds the same ones. With c <= the fourth root / scale < c + 1,

    exp_avg     c + 1 where |x| > T(c + 1/2), else c
    exp_avg_sq  with c the last for which T(c) <= x, at most 254, and u of 0..65535: c + 1 where
                (x - T(c)) 65536 > u (T(c + 1) - T(c)), else c; at least 1 for x > 0

A root that is off by less than half a code proposes c or a neighbour, of which the same codes follow:
next to a half code `exp_avg`'s c is not in doubt, and a doubtful c lies next to T(c), far from T(c + 1/2);
`exp_avg_sq` takes the code nearest to the root, and T of that says on which side of it x lies.
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
    size = _rows(x.abs())
    root, scale = _scaled(size, SIGNED)
    code = root.sub_(0.5).round_().clamp_(min=0)
    code += size > _fourth_power(code + 0.5, scale)
    return _unrowed(code, x).copysign_(x).to(torch.int8), scale[:, 0]


def encode8_stochastically(x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 >= 0 of one block -> uint8 codes of its shape, and scales [ceil(n / 64)].

    Args:
        bits: whole numbers from 0 to 65535, of the shape of `x`; None: to nearest.
    """
    rows = _rows(x)
    root, scale = _scaled(rows, UNSIGNED)
    if bits is None:
        code = root.round_().clamp_(max=UNSIGNED)
    else:
        near = root.round_().clamp_(max=UNSIGNED - 1)
        this = _fourth_power(near, scale)
        other = near + (rows - this).sign_().add_(0.5).sign_()  # the neighbour on the side of x
        that = _fourth_power(other, scale)
        code = torch.minimum(near, other)
        code += (rows - torch.minimum(this, that)) * 65536 > _rows(bits.float()) * (that - this).abs_()
    code = torch.where(rows > 0, code.nan_to_num_(nan=1.0).clamp_(min=1), 0.0)
    return _unrowed(code, x).to(torch.uint8), scale[:, 0]


def _fourth_power(code: Tensor, scale: Tensor) -> Tensor:
    return (code * scale).square_().square_()


def _rows(x: Tensor) -> Tensor:
    """[ceil(n / 64), 64], the last row filled up with zeros."""
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % QUANTUM)).view(-1, QUANTUM)


def _unrowed(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(-1)[:like.numel()].view(like.shape)


def _scaled(rows: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Fourth roots in units of their scales, 0 for NaNs, and scales [n, 1]: infinite where one of the 64 is NaN."""
    root = rows.sqrt().sqrt_()
    scale = root.nan_to_num(nan=float("inf"), posinf=float("inf")).amax(1, keepdim=True) / codes
    return (root * (1 / scale.clamp_min(1e-30))).nan_to_num_(nan=0.0), scale
