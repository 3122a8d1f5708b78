"""One function per kernel: check input, build tables, launch; CPU backend, oracle. Imports: tensors, csrc_triton."""

from .adamw import (
    Block, DeviceHypers, GradControl, HyperRow, HyperTable, Launches, ParamUpdate, counted, decode8,
    encode8, encode8_stochastically, head_adamw_, head_grad_norm, join_master, n_scales,
)
from .delta import METRICS, Segment, head_delta, head_delta_projection
from .device import capturing

__all__ = [
    "Block", "DeviceHypers", "GradControl", "HyperRow", "HyperTable", "Launches", "METRICS", "ParamUpdate",
    "Segment", "capturing", "counted", "decode8", "encode8", "encode8_stochastically", "head_adamw_", "head_delta",
    "head_delta_projection", "head_grad_norm", "join_master", "n_scales",
]
