"""One function per kernel: check input, build tables, launch; CPU backend, oracle. Imports: tensors, csrc_triton."""

from .adamw import (
    Block, Hyper, Launches, Numbers, Update, decode8, encode8, encode8_stochastically, head_adamw_, head_grad_norm,
    join, n_scales, numbers_on_device,
)
from .delta import METRICS, Segment, head_delta, head_delta_projection

__all__ = [
    "Block", "Hyper", "Launches", "METRICS", "Numbers", "Segment", "Update", "decode8", "encode8",
    "encode8_stochastically", "head_adamw_", "head_delta", "head_delta_projection", "head_grad_norm", "join",
    "n_scales", "numbers_on_device",
]
