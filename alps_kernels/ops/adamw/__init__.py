"""One AdamW step on slices of many parameters: op, tables, launch, CPU, oracle. Imports: tensors, csrc_triton."""

from .op import Launches, head_adamw_, head_grad_norm
from .param_update import Block, DeviceHypers, GradControl, HyperRow, HyperTable, ParamUpdate, counted
from .quantize8 import decode8, encode8, encode8_stochastically, n_scales
from .rounding import join_master

__all__ = [
    "Block", "DeviceHypers", "GradControl", "HyperRow", "HyperTable", "Launches", "ParamUpdate", "counted", "decode8",
    "encode8", "encode8_stochastically", "head_adamw_", "head_grad_norm", "join_master", "n_scales",
]
