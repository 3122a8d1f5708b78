"""One AdamW step on the selected slices of many parameters: op, tables, launch, CPU backend, oracle."""

from .codes8 import decode8, encode8, encode8_stochastically, n_scales
from .op import Launches, head_adamw_, head_grad_norm
from .param_update import Block, HyperRow, HyperTable, ParamUpdate, hyper_rows_on_device
from .rounding import join

__all__ = [
    "Block", "HyperRow", "HyperTable", "Launches", "ParamUpdate", "decode8", "encode8", "encode8_stochastically",
    "head_adamw_", "head_grad_norm", "hyper_rows_on_device", "join", "n_scales",
]
