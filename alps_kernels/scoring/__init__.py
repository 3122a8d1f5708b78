"""How far each head moved: `score_heads`, `HeadScores`, plots. Imports: tensors, ops, layout, selection, weights."""

from .plots import curves, memory_bars, new_figure
from .representations import REPRESENTATIONS
from .score import score_heads
from .scores import HeadScores

__all__ = ["HeadScores", "REPRESENTATIONS", "curves", "memory_bars", "new_figure", "score_heads"]
