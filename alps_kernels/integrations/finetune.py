"""The paper's loop as a function: a cheap task model, the scores, then the base on its top heads alone."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..layout import find_heads
from ..optim import HALVES, HeadAdamW
from ..scoring import HeadScores, score_heads
from ..selection import HeadSelection
from ..slicing import slice_heads, unslice_heads
from ..tensors import check_type, read_json, write_json
from ..version import __version__
from .callback import HEADS_FILE, SCORES_FILE, check_run_options, trained_share
from .start_weights import digest_of_tensors
from .trainer import use_heads

FORMAT, VERSION = "alps_kernels.finetune", 1
RUN_FILE, TASK, HEADS, MODEL = "alps_run.json", "task", "heads", "model"
# Of the paper, section 4.1: AdamW, cosine to a tenth of the learning rate, 128 sequences a step.
RECIPE = {"learning_rate": 2e-5, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.999, "warmup_steps": 0.1,
          "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "num_train_epochs": 3,
          "per_device_train_batch_size": 8, "gradient_accumulation_steps": 16}
WATCHED = (*RECIPE, "max_steps", "seed", "max_grad_norm")  # a run that goes on with others of these is another run


@dataclass(frozen=True)
class AlpsRun:
    """What `alps_finetune` made.

    Attributes:
        scores, heads: of the base against the task model; `output_dir`/alps_scores.json and
            alps_heads.json.
        model: the base, fine-tuned on the heads; `output_dir`/model.
        provenance: recipe, data, versions, dates and losses of the stages; `output_dir`/alps_run.json.
    """

    scores: HeadScores
    heads: HeadSelection
    model: nn.Module
    provenance: dict[str, Any]


def paper_arguments(output_dir: str | os.PathLike, cls: type = TrainingArguments, **changes: Any) -> Any:
    """TrainingArguments (or TRL's SFTConfig, by `cls`) with the paper's recipe, changed by `changes`."""
    return cls(str(output_dir), **{**RECIPE, "report_to": [], **changes})


def alps_finetune(
    model: nn.Module,
    train_dataset: Any,
    output_dir: str | os.PathLike,
    *,
    args: Any = None,
    task_args: Any = None,
    task_model: nn.Module | str | os.PathLike | None = None,
    task_share: float = 0.10,
    trainer: type = Trainer,
    ratio: float = 0.10,
    metric: str = "pad",
    representation: str = "projection",
    temperature: float = 1.0,
    attention: str | Sequence[int] = "all",
    kv: str = "any",
    parts: Sequence[str] = ("q", "k", "v"),
    rest: str = "frozen",
    sliced: bool = False,
    **trainer_options: Any,
) -> AlpsRun:
    """Fine-tune `model` on the heads that a task moves most (ALPS, Chen et al. 2025).

    1. task: a copy of the model learns a share of the data, all weights, to `output_dir`/task.
    2. score: every head of the base against that task model; the top ones are kept.
    3. heads: the model itself learns all of the data, on those heads alone.

    Called again with the same arguments, model and folder it goes on where it was stopped:
    finished stages are read, the one in the middle resumes from its last checkpoint.

    Args:
        model: the base; trained in place.
        train_dataset: of `trainer`; with `task_share` < 1 it must have a length.
        output_dir: everything is written below it.
        args: TrainingArguments of stage 3; default: `paper_arguments`. `output_dir` is ours.
        task_args: of stage 1; default: `args`.
        task_model: a task model that is there already, or its checkpoint; stage 1 falls away.
        task_share: of the data for stage 1, drawn with `args.seed`.
        trainer: the Trainer class; with TRL's SFTTrainer give its `args` (an SFTConfig).
        ratio, metric, representation, temperature, attention: see `score_heads` and `HeadScores.top`.
        kv, parts, rest: what trains, see `HeadSelection`.
        sliced: train with sliced gradients (`slice_heads`): less memory; the model is whole again
            afterwards.
        trainer_options: given to both Trainers (`data_collator`, `processing_class`, `callbacks` ...).

    Raises:
        TypeError, ValueError: an option that does not exist; a folder in which another run (other
            options, data or base) was begun; the difference is named.
    """
    check_type("model", model, nn.Module, "a model in memory")
    check_run_options(ratio, metric, representation, kv, parts, rest)
    if isinstance(task_share, bool) or not isinstance(task_share, (int, float)) or not 0 < task_share <= 1:
        raise ValueError(f"task_share is {task_share!r}; expected a number above 0, at most 1")
    args = paper_arguments(output_dir) if args is None else args
    task_args = args if task_args is None else task_args
    size = len(train_dataset) if isinstance(train_dataset, Sized) else None
    if size is None and task_share < 1 and task_model is None:
        raise ValueError("train_dataset has no length, so that no share of it can be drawn; give task_share=1")
    layout = find_heads(model)
    base = {name: param.detach() for name, param in model.named_parameters() if name in layout.shapes}
    scoring = {"metric": metric, "representation": representation, "temperature": temperature, "attention": attention}
    run = _Run(Path(output_dir), {
        "base": digest_of_tensors(base), "examples": size, "ratio": ratio, "kv": kv, "parts": list(parts), "rest": rest,
        **scoring, "attention": attention if isinstance(attention, str) else list(attention),
        "task_share": None if task_model is not None else task_share,
        "args": _watched(args), "task_args": None if task_model is not None else _watched(task_args)})
    if run.done("score"):
        scores, heads = HeadScores.load(run.folder / SCORES_FILE), HeadSelection.load(run.folder / HEADS_FILE)
    else:
        if task_model is None:
            task_model = run.folder / TASK / MODEL
            if not run.done(TASK):
                part = train_dataset if task_share == 1 else _share(train_dataset, task_share, task_args.seed)
                run.finish(TASK, _fit_task(model, part, run.folder / TASK, task_args, trainer, trainer_options))
        scores = score_heads(model, task_model, **scoring)
        heads = scores.top(ratio, kv=kv, parts=parts)
        if run.writes:
            scores.save(run.folder / SCORES_FILE)
            heads.save(run.folder / HEADS_FILE)
        run.finish("score", {"heads": len(heads), "of": len(scores)})

    if run.done(HEADS):
        trained = type(model).from_pretrained(run.folder / HEADS / MODEL, dtype=next(model.parameters()).dtype)
        model.load_state_dict(trained.state_dict())
    else:
        run.finish(HEADS, _fit_heads(model, heads, train_dataset, run.folder / HEADS, args, trainer, trainer_options,
                                     rest, sliced))
    return AlpsRun(scores, heads, model, run.document)


def _fit_task(base: nn.Module, dataset: Any, folder: Path, args: Any, trainer: type, options: dict) -> dict[str, Any]:
    """Stage 1; 16-bit weights with an exact master, for at this learning rate most would not move."""
    task = copy.deepcopy(base)
    optimizer = None
    if any(param.dtype in HALVES for param in task.parameters()):
        optimizer = (HeadAdamW, {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2),
                                 "eps": args.adam_epsilon})
    made = trainer(model=task, args=_below(args, folder), train_dataset=dataset, optimizer_cls_and_kwargs=optimizer,
                   **options)
    facts = _train(made, folder)
    del made, task
    gc.collect()  # a Trainer and its model hold each other
    return {**facts, "examples": len(dataset) if isinstance(dataset, Sized) else None}


def _fit_heads(model: nn.Module, heads: HeadSelection, dataset: Any, folder: Path, args: Any, trainer: type,
               options: dict, rest: str, sliced: bool) -> dict[str, Any]:
    """Stage 3."""
    if sliced:
        slice_heads(model, heads, rest=rest)
    try:
        made = trainer(model=model, args=_below(args, folder), train_dataset=dataset, **options)
        bound = use_heads(made, heads, rest=rest)
        facts = {**_train(made, folder), **trained_share(bound, model)}
    finally:
        if sliced:
            unslice_heads(model)
    return facts


def _train(made: Any, folder: Path) -> dict[str, Any]:
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    outcome = made.train(resume_from_checkpoint=last)
    made.save_model(str(folder / MODEL))
    if torch.distributed.is_initialized():  # the first rank saves, and all of them read
        torch.distributed.barrier()
    return {"steps": outcome.global_step, "loss": outcome.training_loss, "resumed_from": last and Path(last).name}


def _below(args: Any, folder: Path) -> Any:
    """The same arguments for a folder of their own."""
    args = copy.copy(args)
    args.output_dir = str(folder)
    return args


def _share(dataset: Any, share: float, seed: int) -> Any:
    """A seeded draw of the examples, at least one."""
    n = max(1, round(share * len(dataset)))
    draw = torch.Generator().manual_seed(seed)
    chosen = sorted(torch.randperm(len(dataset), generator=draw, device="cpu")[:n].tolist())
    return dataset.select(chosen) if hasattr(dataset, "select") else torch.utils.data.Subset(dataset, chosen)


def _watched(args: Any) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in WATCHED}
    return {name: getattr(value, "value", value) for name, value in values.items()}


class _Run:
    """`alps_run.json`: what the run is, and which stages are done; ValueError where the folder holds another run."""

    def __init__(self, folder: Path, recipe: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / RUN_FILE
        self.writes = int(os.environ.get("RANK", "0")) == 0  # of several ranks the first
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.document = read_json(self.path, FORMAT, VERSION)
            theirs, ours = _flat(self.document.get("recipe", {})), _flat(recipe)
            for name in sorted({*theirs, *ours}):
                if theirs.get(name) != ours.get(name):
                    raise ValueError(f"{folder} holds a run with {name} {theirs.get(name)!r}, this one has "
                                     f"{ours.get(name)!r}; give it another output_dir")
            return
        self.document = {"format": FORMAT, "version": VERSION, "recipe": recipe, "stages": {},
                         "versions": {"alps_kernels": __version__, "torch": torch.__version__,
                                      "transformers": version("transformers")}}
        self._write()

    def done(self, stage: str) -> bool:
        return stage in self.document["stages"]

    def finish(self, stage: str, facts: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.document["stages"][stage] = {**facts, "finished": now}
        self._write()

    def _write(self) -> None:
        if self.writes:
            write_json(self.path, self.document)


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in document.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
