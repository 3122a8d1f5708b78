"""How 16-bit weights and moments are kept: master weights, stochastic rounding, its random bits."""

from __future__ import annotations

import torch
from torch import Tensor

NAN_BITS = 0x7FC00000
MASK32 = 0xFFFFFFFF
PARAM_BITS, EXP_AVG_BITS, EXP_AVG_SQ_BITS = range(3)  # what random bits round: `random_bits`'s purpose


def join_master(param: Tensor, low: Tensor | None) -> Tensor:
    """The master weight that `param` and its `low` part stand for: float32, or float64 as it is.

    A float32 or float64 parameter is its own master and comes back itself, not a copy.
    """
    if low is None:
        return param if param.dtype == torch.float64 else param.to(torch.float32)
    if low.dtype == torch.int16 and param.dtype == torch.bfloat16:
        return ((param.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
    if low.dtype == torch.int16:
        return param.float() + low.float() * (_spacing_fp16(param.float()) / 65536)
    return param.float() + low.float()


def split(master: Tensor, dtype: torch.dtype, low: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """The float32 `master` as a 16-bit parameter of `dtype`, and what is left, of dtype `low`.

    int16 beside bfloat16 holds the lower 16 bits: with rounding half up the pair is a bijection
    of all float32 but NaNs, which become one NaN. int16 beside float16 counts 65536ths of the
    parameter's spacing: exact from 2^-17 up to the largest float16, below that to 2^-40.
    A `low` of the parameter's dtype (Kahan) holds the rounded rest.
    """
    if low == torch.int16 and dtype == torch.bfloat16:
        bits = torch.where(master.isnan(), NAN_BITS, master.view(torch.int32))
        high = (bits + 0x8000) >> 16
        return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
    param = master.to(dtype)
    if low is None:
        return param, None
    rest = torch.where(param.isfinite(), master - param.float(), 0.0)
    if low == torch.int16:
        rest = (rest / (_spacing_fp16(param.float()) / 65536)).round_().clamp_(-32768, 32767)
    return param, rest.to(low)


def _spacing_fp16(value: Tensor) -> Tensor:
    """The distance between float16 numbers at `value` (a float16 number held in float32)."""
    power = (value.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |value|)
    return torch.where(value.isfinite(), (power * 2.0**-10).clamp_min_(2.0**-24), 1.0)


def round_stochastically(value: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> a neighbour in `dtype`, the nearer one the likelier; exact values stay.

    Args:
        bits: whole numbers from 0 to 65535, int32 or int64; float16 uses the lower 13 bits.
    """
    raw = value.contiguous().view(torch.int32)
    noise = bits.to(torch.int32)
    if dtype == torch.bfloat16:
        moved = ((raw + noise) & -0x10000).view(torch.float32)
    else:
        normal = ((raw + (noise & 0x1FFF)) & -0x2000).view(torch.float32)
        tiny = (value.abs() * 2.0**24 + (noise & 0x1FFF).float() / 8192).floor() * 2.0**-24
        moved = torch.where(value.abs() < 2.0**-14, tiny.copysign(value), normal)
    return torch.where(value.isfinite(), moved, value).to(dtype)


def random_bits(n: int, seed: int, step: int, stream: int, purpose: int,
                device: torch.device | str = "cpu") -> Tensor:
    """16 random bits for each of n state elements, int64 [n]: Philox 4x32-10.

    Counter (i // 8, step, 4 stream + purpose), key `seed`; element i takes half i % 2 of word
    (i % 8) // 2, so the bits depend on nothing but the element, step and seed.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    group = torch.arange((n + 7) // 8, dtype=torch.int64, device=device)
    counter = [group & MASK32, group >> 32, torch.full_like(group, step & MASK32),
               torch.full_like(group, (4 * stream + purpose) & MASK32)]
    keys = [seed & MASK32, (seed >> 32) & MASK32]
    for _ in range(10):
        c0, c1, c2, c3 = counter
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        counter = [high1 ^ c1 ^ keys[0], low1, high0 ^ c3 ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & MASK32, (keys[1] + 0xBB67AE85) & MASK32]
    words = torch.stack(counter, 1)  # [groups, 4]
    return torch.stack([words & 0xFFFF, words >> 16], 2).view(-1)[:n]


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for numbers below 2^32, without leaving int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & MASK32
