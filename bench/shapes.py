"""Attention shapes of real models and selections of their heads."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The attention of a decoder: [heads * head_dim, hidden] queries, [groups * head_dim, hidden] keys and values."""

    name: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int

    @property
    def attention_params(self) -> int:
        """q, k, v and o weights."""
        return self.layers * self.hidden * self.head_dim * 2 * (self.heads + self.groups)


# From the models' published config.json.
SHAPES = {shape.name: shape for shape in (
    Shape("SmolLM2-135M", 30, 576, 9, 3, 64),
    Shape("Llama-3.2-1B", 16, 2048, 32, 8, 64),
    Shape("Llama-3.2-3B", 28, 3072, 24, 8, 128),
    Shape("Qwen2.5-7B", 28, 3584, 28, 4, 128),
    Shape("Llama-3.1-8B", 32, 4096, 32, 8, 128),
)}
RATIOS = (0.01, 0.10, 0.30, 1.00)


def heads_of(shape: Shape, ratio: float, *, adjacent: bool, seed: int = 0) -> list[tuple[int, int]]:
    """(layer, head) pairs at a ratio: scattered over the model, or the first heads of every layer."""
    n = max(1, round(ratio * shape.layers * shape.heads))
    if not adjacent:
        pairs = [(layer, head) for layer in range(shape.layers) for head in range(shape.heads)]
        return sorted(random.Random(seed).sample(pairs, n))
    per_layer, extra = divmod(n, shape.layers)
    return [(layer, head) for layer in range(shape.layers) for head in range(per_layer + (layer < extra))]
