"""One AdamW step on the selected slices of many parameters: op, tables, launch, CPU backend, oracle."""

from .codes8 import decode8, encode8, encode8_stochastically
from .op import Launches, head_adamw_, head_grad_norm
from .param_update import Block, Hyper, Numbers, Update, numbers_on_device
from .rounding import join
from .tables import n_scales

__all__ = [
    "Block", "Hyper", "Launches", "Numbers", "Update", "decode8", "encode8", "encode8_stochastically", "head_adamw_",
    "head_grad_norm", "join", "n_scales", "numbers_on_device",
]
