"""Where each attention head lives in a model's weights: `find_heads`, `HeadLayout`, `verify`. Imports: tensors."""

from .discover import find_heads
from .layout import HeadLayout
from .slices import PART_OF, AttentionLayer, HeadSlice, LayerSummary, LayoutError

__all__ = ["AttentionLayer", "HeadLayout", "HeadSlice", "LayerSummary", "LayoutError", "PART_OF", "find_heads"]
