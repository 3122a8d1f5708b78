"""Train heads alone with transformers' Trainer and what is built on it (TRL's SFTTrainer)."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from ..optim import HeadAdamW
from ..selection import BoundSelection, HeadSelection, selection_of
from ..tensors import check_type
from .callback import AlpsCallback, report, trained_share
from .resume import FollowingHeadAdamW, refuse_sharded, unwrap_optimizer

# Options of HeadAdamW that the TrainingArguments decide, and what they are called there.
THEIRS = {"lr": "learning_rate", "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon",
          "weight_decay": "weight_decay", "max_grad_norm": "max_grad_norm"}


def use_heads(trainer: Any, heads: HeadSelection | AlpsCallback | None = None, *, rest: str | None = None,
              **options: Any) -> BoundSelection:
    """Let a Trainer train heads alone, with HeadAdamW: after it is made and before `train()`.

    Learning rate, betas, epsilon and weight decay are those of its TrainingArguments, the
    schedule too. `max_grad_norm` of the TrainingArguments clips the norm of what trains (a
    partly selected weight's gradient outside the selection does not count), and the logged
    `grad_norm` is that norm. What trains is logged once, at the beginning of training.

    Args:
        trainer: transformers' Trainer or a subclass, made with a model (not with `model_init`).
        heads: the selection, an `AlpsCallback` that finds one on the way, or None: what
            `freeze` or `slice_heads` last put on the model.
        rest: as in `HeadSelection.freeze`; default: as last told of this model, else "frozen".
        options: of HeadAdamW: `master`, `moment_dtype`, `amsgrad`, `seed` ...

    Returns:
        what trains (in the warm-up, for an `AlpsCallback`).

    Raises:
        TypeError, ValueError: no Trainer, no selection, an optimizer that is there already, a
            model that will be sharded or made anew, an option that TrainingArguments decide.
    """
    model = _checked(trainer, options)
    if isinstance(heads, AlpsCallback):
        if rest is not None:
            raise ValueError("rest is the callback's: AlpsCallback(..., rest=...)")
        bound, optimizer, kwargs = heads.prepare(model), FollowingHeadAdamW, {}
        heads.log, callback = trainer.log, heads
    else:
        heads = selection_of(model) if heads is None else heads
        check_type("heads", heads, HeadSelection,
                   "a HeadSelection, an AlpsCallback, or a model that was frozen or sliced")
        bound = heads.freeze(model, rest=heads.bind(model, rest=rest).rest)
        optimizer, kwargs, callback = HeadAdamW, {"heads": bound}, ReportShare(trainer.log)
    args = trainer.args
    defaults = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    trainer.optimizer_cls_and_kwargs = (optimizer, {**defaults, **kwargs, **options})
    trainer.accelerator.clip_grad_norm_ = partial(_clip, trainer)
    if callback not in trainer.callback_handler.callbacks:
        trainer.add_callback(callback)
    return bound


def _checked(trainer: Any, options: dict[str, Any]) -> torch.nn.Module:
    if not all(hasattr(trainer, name) for name in ("optimizer_cls_and_kwargs", "accelerator", "callback_handler")):
        raise TypeError(f"expected a transformers Trainer, not {type(trainer).__name__}")
    if getattr(trainer, "optimizer", None) is not None:
        raise ValueError("the Trainer has an optimizer already: call use_heads before train(), and give the Trainer no "
                         "optimizers=")
    if getattr(trainer, "model_init", None) is not None:
        raise ValueError("the Trainer makes its model anew in train() (model_init), which no selection can be bound "
                         "to; give it a model")
    refuse_sharded(trainer.args)
    for name in options:
        if name in THEIRS:
            raise ValueError(f"{name} is {THEIRS[name]} of the TrainingArguments; set it there")
        if name == "params" or name not in inspect.signature(HeadAdamW).parameters:
            raise TypeError(f"HeadAdamW takes no option {name!r} here")
    return trainer.accelerator.unwrap_model(trainer.model)


class ReportShare(TrainerCallback):
    """Says what trains, when training begins."""

    def __init__(self, log: Any) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        inner = unwrap_optimizer(optimizer)
        if not isinstance(inner, HeadAdamW) or inner.heads is None:
            raise TypeError(f"the Trainer made {type(inner).__name__} and not the HeadAdamW that use_heads gave it")
        if state.global_step == 0:  # a resumed run has it in its history
            report(self.log, state, trained_share(inner.heads, model))


@torch.no_grad()
def _clip(trainer: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> torch.Tensor:
    """`Accelerator.clip_grad_norm_` over what trains alone, whatever parameters it lies in."""
    trainer.accelerator.unscale_gradients()
    parts = [part for part in unwrap_optimizer(trainer.optimizer).heads.params if part.param.grad is not None]
    blocks = [block for part in parts for block in part.blocks(part.param.grad)]
    norm = torch.nn.utils.get_total_norm(blocks, norm_type)
    if max_norm != float("inf"):
        torch.nn.utils.clip_grads_with_norm_([part.param for part in parts], max_norm, norm)
    return norm
