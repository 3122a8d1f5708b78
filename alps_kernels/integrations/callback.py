"""ALPS in one run of transformers' Trainer: warm up on every head, score them, keep the top ones, go on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.training_args import ParallelMode

from ..layout import find_heads
from ..ops import METRICS
from ..optim import HeadAdamW
from ..scoring import REPRESENTATIONS, HeadScores, score_heads
from ..selection import REST, BoundSelection, HeadSelection, remember, top_count
from ..tensors import check_choice, save_tensors, synced_slice_of
from ..weights import ModelWeights
from .resume import FollowingHeadAdamW, masters, refuse_sharded, unwrap_optimizer
from .start_weights import START_FILE, digest_of_tensors, read_start, restore_start

RESTORE = ("base", "keep")
SCORES_FILE, HEADS_FILE = "alps_scores.json", "alps_heads.json"


class AlpsCallback(TrainerCallback, ExportableState):
    """One run instead of two: train all heads for some steps, then the ones that moved most.

    `alps.use_heads(trainer, AlpsCallback(...))` puts it and its optimizer into a Trainer. In
    `callbacks=[AlpsCallback(...)]` it works with any HeadAdamW that the Trainer makes, but only
    the optimizer of `use_heads` can resume from a checkpoint that was saved after the switch.

    The moments and step counts of heads that are kept stay, those of all others go; the
    learning rate's schedule runs on. What the heads were before the run is kept until the
    switch, attention weights alone (`start_bytes`); in a run that saves it also lies in
    `output_dir`/alps_start.safetensors, from which a run is resumed that was stopped before
    the switch. At the switch `output_dir` gets alps_scores.json and alps_heads.json.

    16-bit weights are scored with what their master holds beyond 16 bits.

    Args:
        ratio: keep ceil(ratio n) of the n heads scored.
        warmup_steps: optimizer steps on all heads before they are scored.
        restore: "base": every byte of the heads that are not kept goes back to what it was
            when the run began. "keep": they stay as the warm-up left them.
        metric, representation, temperature, attention: see `score_heads`.
        kv, parts: what trains of a head, see `HeadSelection`; in the warm-up too.
        rest: "frozen" or "trainable": the other weights, see `HeadSelection.bind`.
        start_device: where the copy is kept; None: beside the weights.

    Attributes:
        heads: the selection, None before the switch.
        scores: what it was made from, None before the switch and in a run resumed after it.
        start_bytes: size of the copy that is held, 0 after the switch.

    Raises:
        ValueError, TypeError: an option that does not exist, here; at the beginning of training
            what does not fit the run: another optimizer, a warm-up as long as the run, a sliced
            or sharded model, a checkpoint of another run.
    """

    def __init__(self, ratio: float = 0.10, warmup_steps: int = 200, *, restore: str = "base", metric: str = "pad",
                 representation: str = "projection", temperature: float = 1.0, attention: str | Sequence[int] = "all",
                 kv: str = "any", parts: Sequence[str] = ("q", "k", "v"), rest: str = "frozen",
                 start_device: str | None = "cpu") -> None:
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 1:
            raise ValueError(f"warmup_steps is {warmup_steps!r}; expected a whole number from 1")
        check_choice("restore", restore, RESTORE)
        check_run_options(ratio, metric, representation, kv, parts, rest)
        seen = "qkv" if representation == "projection" else representation
        if rest == "frozen" and not set(seen) & set(parts):
            raise ValueError(f"the warm-up trains {'/'.join(parts)}, of which representation {representation!r} sees "
                             "nothing")
        self.options = {"ratio": ratio, "warmup_steps": warmup_steps, "restore": restore, "metric": metric,
                        "representation": representation, "temperature": temperature, "attention": attention,
                        "kv": kv, "parts": list(parts), "rest": rest, "start_device": start_device}
        self.heads: HeadSelection | None = None
        self.scores: HeadScores | None = None
        self.log: Callable[[dict[str, float]], None] | None = None  # the Trainer's, where `use_heads` knows it
        self._start: dict[str, Tensor] = {}
        self.saved: dict[str, Any] = {"heads": None, "digest": None}

    @property
    def start_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._start.values())

    # -- what the Trainer calls --------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this: the options, the selection, the digest of the start."""
        return {"args": dict(self.options), "attributes": {"saved": self.saved}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if model is not None:  # before it is wrapped: DDP asks then which gradients will come
            self.prepare(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any,
                       **kwargs: Any) -> None:
        optimizer = unwrap_optimizer(optimizer)
        self._check(args, state, optimizer)
        warm = self.prepare(model)
        if state.global_step == 0:
            self.heads, self.scores = None, None
            optimizer.set_heads(warm)
            self._remember_start(args, state, model, warm)
            report(self.log, state, {**trained_share(warm, model), "alps_start_bytes": self.start_bytes})
            return
        told = state.stateful_callbacks.get(type(self).__name__)
        told = told[0] if isinstance(told, list) and told else told
        if not isinstance(told, Mapping) or not isinstance(told.get("attributes", {}).get("saved"), Mapping):
            raise ValueError(f"step {state.global_step} of this run was saved without AlpsCallback: its selection and "
                             "the weights it started from are not known")
        theirs, ours = told.get("args", {}), json.loads(json.dumps(self.options))
        for name in ours:
            if name != "start_device" and theirs.get(name) != ours[name]:
                raise ValueError(f"this run was begun with {name} {theirs.get(name)!r}, AlpsCallback now has "
                                 f"{ours[name]!r}")
        self.saved = dict(told["attributes"]["saved"])
        if self.saved["heads"] is not None:
            self.heads = HeadSelection.from_json(self.saved["heads"])
            optimizer.set_heads(self._narrow(args, model))
        else:
            self.heads = None
            optimizer.set_heads(warm)
            self._start = read_start(os.path.join(args.output_dir, START_FILE), self.saved["digest"], warm, self._home)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        if self.heads is None and state.global_step >= self.options["warmup_steps"]:
            self._switch(args, state, model, unwrap_optimizer(optimizer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_global_step
        if self.heads is not None and args.load_best_model_at_end and best and best < self.options["warmup_steps"]:
            warnings.warn(f"the best model, which was loaded, is that of step {best} of the warm-up: all heads are "
                          "trained in it", stacklevel=2)

    # -- the two halves ----------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> BoundSelection:
        """Let the selected parts of all heads train, and what `rest` says; what the warm-up trains.

        Raises:
            LayoutError: the heads of `model` cannot be located.
            ValueError: it is sliced already.
        """
        if sliced := [name for name, param in model.named_parameters() if synced_slice_of(param) is not None]:
            raise ValueError(f"{sliced[0]} is a slice: AlpsCallback warms up all heads, give it the model unsliced "
                             "(unslice_heads)")
        layout = find_heads(model)
        layout.where(self.options["attention"])
        everything = HeadSelection.all(layout, kv=self.options["kv"], parts=self.options["parts"])
        return everything.freeze(model, rest=self.options["rest"], layout=layout)

    def _check(self, args: Any, state: Any, optimizer: Any) -> None:
        if not isinstance(optimizer, HeadAdamW):
            raise TypeError(f"AlpsCallback needs HeadAdamW as optimizer and found {type(optimizer).__name__}: write "
                            "alps.use_heads(trainer, callback), or give the Trainer "
                            "optimizer_cls_and_kwargs=(alps.HeadAdamW, {'lr': ...})")
        if self.options["warmup_steps"] >= state.max_steps:
            raise ValueError(f"the warm-up of {self.options['warmup_steps']} steps does not end before the run, which "
                             f"has {state.max_steps}")
        refuse_sharded(args)
        if not isinstance(optimizer, FollowingHeadAdamW) and args.save_strategy != "no":
            warnings.warn("checkpoints saved after the switch will only resume with the optimizer that "
                          "alps.use_heads(trainer, callback) gives the Trainer", stacklevel=2)

    def _home(self, tensor: Tensor) -> torch.device | str:
        return self.options["start_device"] or tensor.device

    def _remember_start(self, args: Any, state: Any, model: nn.Module, warm: BoundSelection) -> None:
        layout = find_heads(model)
        self._start = {part.name: part.param.detach().contiguous().to(self._home(part.param), copy=True)
                       for part in warm.params if part.name in layout.shapes}
        self.saved = {"heads": None, "digest": digest_of_tensors(self._start)}
        # One layer against itself: an error is better now than after the warm-up.
        self._score(model, layout.where(self.options["attention"])[:1], None)
        if state.is_world_process_zero and args.save_strategy != "no":
            os.makedirs(args.output_dir, exist_ok=True)
            save_tensors(os.path.join(args.output_dir, START_FILE), self._start)

    def _score(self, model: nn.Module, attention: Any, optimizer: HeadAdamW | None) -> HeadScores:
        base, task = ModelWeights(model, "start"), ModelWeights(model, "warmed up")
        base.replace(self._start)
        task.replace({} if optimizer is None else masters(optimizer, self._start))
        options = {name: self.options[name] for name in ("metric", "representation", "temperature")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*identical attention weights")
            return score_heads(base, task, **options, attention=attention, device=next(model.parameters()).device)

    def _switch(self, args: Any, state: Any, model: nn.Module, optimizer: HeadAdamW) -> None:
        options, warm = self.options, optimizer.heads
        scores = self._score(model, options["attention"], optimizer)
        if not scores.tensor.any():
            raise ValueError(f"no head moved in {state.global_step} warm-up steps (the learning rate is now "
                             f"{optimizer.param_groups[0]['lr']}): there is nothing to choose by")
        heads = scores.top(options["ratio"], kv=options["kv"], parts=options["parts"])
        kept = heads.bind(model, rest=options["rest"])
        optimizer.set_heads(kept)
        if options["restore"] == "base":
            restore_start(warm, kept, self._start)
        self.heads, self.scores, self._start = heads, scores, {}
        self.saved = {"heads": heads.to_json(), "digest": self.saved["digest"]}
        self._narrow(args, model)
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            scores.save(os.path.join(args.output_dir, SCORES_FILE))
            heads.save(os.path.join(args.output_dir, HEADS_FILE))
        report(self.log, state, trained_share(kept, model))

    def _narrow(self, args: Any, model: nn.Module) -> BoundSelection:
        """Let the selection alone have gradients; DDP was told of more and goes on waiting for them."""
        rest = self.options["rest"]
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            remember(model, (self.heads, rest))
            return self.heads.bind(model, rest=rest)
        return self.heads.freeze(model, rest=rest)


def trained_share(bound: BoundSelection, model: nn.Module) -> dict[str, float]:
    """What trains, counted honestly: elements, not parameters that hold some."""
    every = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    return {"alps_heads": len(bound.selection), "alps_heads_of": sum(bound.selection.heads_per_layer),
            "alps_trained": bound.numel, "alps_trained_of_model": bound.numel / max(sum(every.values()), 1),
            "alps_trained_of_qkv": bound.count.share()}


def report(log: Callable[[dict[str, float]], None] | None, state: Any, numbers: dict[str, float]) -> None:
    """Into the Trainer's logs, at least into its history."""
    if log is not None:
        log(dict(numbers))
    else:
        state.log_history.append({**numbers, "step": state.global_step})


def check_run_options(ratio: float, metric: str, representation: str, kv: str, parts: Sequence[str], rest: str) -> None:
    """What can be said before a run of what comes long after its beginning. Raises ValueError."""
    if top_count(ratio, 1) == 0:
        raise ValueError("ratio is 0: no head would train")
    check_choice("metric", metric, tuple(METRICS))
    check_choice("representation", representation, REPRESENTATIONS)
    check_choice("rest", rest, REST)
    HeadSelection([], [], kv=kv, parts=parts)
