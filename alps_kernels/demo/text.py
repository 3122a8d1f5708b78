"""Text that every machine has, to see what a fine-tune forgets: Python's own docs and source."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn

MODULES = ("heapq", "textwrap", "queue", "bisect", "csv")
# English of the language reference; the same names in every supported Python.
TOPICS = ("assignment", "naming", "objects", "exceptions")


def english() -> str:
    topics = import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in TOPICS)


def code() -> str:
    return "\n\n".join(inspect.getsource(import_module(name)) for name in MODULES)


@torch.no_grad()
def perplexity(model: nn.Module, tokenizer, text: str, window: int = 256, windows: int = 8) -> float:
    """exp of the mean negative log-likelihood per token over the first windows of `text`.

    Args:
        window: tokens per window; each window is read on its own.
        windows: how many of them are read, from the beginning of the text.
    """
    model.eval()
    device = next(model.parameters()).device
    ids: Sequence[int] = tokenizer(text)["input_ids"][: window * windows]
    total, count = 0.0, 0
    for at in range(0, len(ids) - 1, window):
        piece = torch.tensor([ids[at:at + window]], device=device)
        if piece.shape[1] > 1:
            loss = model(input_ids=piece, labels=piece).loss
            total += loss.item() * (piece.shape[1] - 1)
            count += piece.shape[1] - 1
    return math.exp(total / max(count, 1))
