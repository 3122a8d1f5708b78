"""Projections whose backward forms only the selected slices of dW. Imports: tensors, layout, selection."""

from .model import slice_heads, unslice_heads
from .weight_grad import head_grad, select_columns

__all__ = ["head_grad", "select_columns", "slice_heads", "unslice_heads"]
