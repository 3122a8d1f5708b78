"""`HeadAdamW`: groups, state, state dict, warnings; it decides, ops computes. Imports: tensors, ops, selection."""

from .head_adamw import HeadAdamW
from .state import HALVES, LOW

__all__ = ["HALVES", "HeadAdamW", "LOW"]
