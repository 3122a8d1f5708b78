"""Where each attention head lives in a model's weights: `find_heads`, `HeadLayout`, `verify`. Imports: tensors."""

from .discover import find_heads
from .layout import AttentionLayer, HeadLayout, HeadSlice, LayerSummary, LayoutError, PART_OF

__all__ = ["AttentionLayer", "HeadLayout", "HeadSlice", "LayerSummary", "LayoutError", "PART_OF", "find_heads"]
