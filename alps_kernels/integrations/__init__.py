"""Trainer, callback, fine-tuning. Imports: tensors, ops, layout, selection, weights, scoring, optim, slicing."""

from .callback import AlpsCallback
from .finetune import alps_finetune, paper_arguments
from .resume import unwrap_optimizer
from .start_weights import restore_start
from .trainer import use_heads

__all__ = ["AlpsCallback", "alps_finetune", "paper_arguments", "restore_start", "unwrap_optimizer", "use_heads"]
