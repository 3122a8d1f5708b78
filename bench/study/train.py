"""One cell: choose what trains, train it, and say what was learned, forgotten and used."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import statistics
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alps_kernels import HeadAdamW, HeadScores, HeadSelection, find_heads, score_heads
from alps_kernels.demo.run import smollm2, tiny_model
from alps_kernels.integrations import restore_start
from bench.counting import state_bytes

from .cells import Cell
from .locks import locked
from .tasks import Item, Splits, answer_loss, answers, collate, forgetting, splits

BETAS = (0.9, 0.999)


@lru_cache(maxsize=1)
def base_model(name: str, dtype: str, device: str) -> tuple[nn.Module, Any]:
    """The base, loaded once: cells train copies of it."""
    torch.manual_seed(0)
    model, tokenizer = tiny_model() if name == "tiny" else smollm2()
    return model.to(device, getattr(torch, dtype)), tokenizer


def run_cell(cell: Cell, plan: dict[str, Any], task_rate: float, cache: Path) -> dict[str, Any]:
    """Train and measure one cell.

    Args:
        task_rate: the learning rate of the task model, where the cell needs one.
        cache: where scores are kept, so that cells that need the same ones share them.

    Returns:
        The measured columns of its row.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base, tokenizer = base_model(plan["model"], plan["dtype"], device)
    data = splits(cell.task, plan["n_train"], plan["n_dev"], plan["n_test"], cell.seed)
    random.seed(cell.seed)
    torch.manual_seed(cell.seed)
    model = copy.deepcopy(base)
    trainer = _Trainer(cell, plan, base, tokenizer, data.train, task_rate, cache)
    model, optimizer, losses = trainer.train(model)
    swept = cell.seed == plan["sweep_seed"]  # of which nothing but the development loss is asked
    return {
        **({} if swept else evaluated(model, tokenizer, data, plan["windows"])),
        "dev_loss": answer_loss(model, tokenizer, data.dev),
        "train_loss": losses[-1], "train_loss_bits": float(losses[-1]).hex(), "steps": len(losses),
        "step_ms": trainer.step_ms, "trained": trainer.trained, "state_bytes": state_bytes(optimizer),
        "file_bytes": trainer.file_bytes, "heads": json.dumps([list(h) for h in trainer.heads]) if trainer.heads else "",
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else "",
    }


def evaluated(model: nn.Module, tokenizer, data: Splits, windows: int) -> dict[str, Any]:
    """What a model learned and forgot."""
    right = [score == 1.0 for score in answers(model, tokenizer, data.test)] if data.test and data.test[0].prompt else []
    return {"exact_match": sum(right) / len(right) if right else math.nan, "right": "".join("01"[r] for r in right),
            "test_loss": answer_loss(model, tokenizer, data.test), **forgetting(model, tokenizer, windows)}


def base_row(cell: Cell, plan: dict[str, Any]) -> dict[str, Any]:
    """The untrained base on the same items."""
    base, tokenizer = base_model(plan["model"], plan["dtype"], "cuda" if torch.cuda.is_available() else "cpu")
    data = splits(cell.task, plan["n_train"], plan["n_dev"], plan["n_test"], cell.seed)
    return {**evaluated(base, tokenizer, data, plan["windows"]), "dev_loss": answer_loss(base, tokenizer, data.dev),
            "steps": 0, "trained": 0, "state_bytes": 0}


class _Trainer:
    """How one cell's method prepares a model, and its training loop."""

    def __init__(self, cell: Cell, plan: dict[str, Any], base: nn.Module, tokenizer, train: list[Item],
                 task_rate: float, cache: Path) -> None:
        self.cell, self.plan, self.base, self.tokenizer, self.items = cell, plan, base, tokenizer, train
        self.task_rate, self.cache = task_rate, cache
        self.heads: HeadSelection | None = None
        self.trained = self.file_bytes = 0
        self.step_ms = math.nan  # the median of the last run of `_fit`

    def train(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
        if self.cell.task_model == "one_run":
            return self._one_run(model)
        model, optimizer = self._prepared(model)
        return model, optimizer, self._fit(model, optimizer, self.items, self.plan["steps"])

    def _prepared(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        cell = self.cell
        if cell.method in ("lora", "shira"):
            model = self._adapted(model)
            params = [p for p in model.parameters() if p.requires_grad]
            self.trained = sum(p.numel() for p in params)
            self.file_bytes = self.trained * (4 if cell.method == "lora" else 12)  # SHiRA: a float32 value, a place
            return model, self._optimizer(params)
        if cell.method == "full":
            self.trained = sum(p.numel() for p in model.parameters())
            self.file_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            return model, self._optimizer(model.parameters())
        layout = find_heads(model)
        rest = "frozen"
        if cell.method == "no_attention":
            self.heads, rest = HeadSelection.none(layout), "trainable"
        elif cell.method == "random":
            self.heads = HeadSelection.random(layout, cell.ratio, seed=cell.seed)
        elif cell.method == "layer_consistent":
            self.heads = HeadSelection.layer_consistent(layout, cell.ratio, seed=cell.seed)
        else:
            rest = "trainable" if cell.method == "alps_rest" else "frozen"
            self.heads = self._scores().top(cell.ratio)
        bound = self.heads.freeze(model, rest=rest)
        self.trained = bound.numel
        self.file_bytes = sum(part.numel * part.param.element_size() for part in bound.params)
        return model, self._optimizer(model.parameters(), heads=bound)

    def _optimizer(self, params, lr: float | None = None, **options) -> HeadAdamW:
        """One optimizer for every method: torch's AdamW with an exact float32 master where weights have 16 bits."""
        return HeadAdamW(params, lr=lr or self.cell.lr, betas=BETAS, weight_decay=self.plan["weight_decay"], **options)

    def _adapted(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, ShiraConfig, get_peft_model

        targets = ["q_proj", "k_proj", "v_proj"]
        if self.cell.method == "lora":
            config = LoraConfig(r=128, lora_alpha=256, target_modules=targets, task_type="CAUSAL_LM")
        else:
            config = ShiraConfig(r=32, target_modules=targets, task_type="CAUSAL_LM", random_seed=self.cell.seed)
        return get_peft_model(model, config)

    def _scores(self) -> HeadScores:
        """The scores that choose, from the cache or from a task model made now."""
        cell = self.cell
        task, kind = cell.heads_from or cell.task, cell.task_model
        wanted = {(cell.metric, cell.representation), ("pad", "projection")}
        if kind == "full" and task in self.plan["wide"]:
            wanted |= set(map(tuple, self.plan["metrics"]))
        made = f"{cell.profile}-{task}-{kind}-{cell.seed}-{self.task_rate:g}"
        paths = {which: self.cache / f"{made}-{'-'.join(which)}.json" for which in wanted}
        with locked(self.cache / made):
            if not all(path.exists() for path in paths.values()):
                model = self._task_model(task, kind)
                for (metric, representation), path in paths.items():
                    score_heads(self.base, model, metric=metric, representation=representation).save(path)
        return HeadScores.load(paths[cell.metric, cell.representation])

    def _task_model(self, task: str, kind: str) -> nn.Module:
        plan, items = self.plan, self.items
        if task != self.cell.task:
            items = splits(task, plan["n_train"], plan["n_dev"], plan["n_test"], self.cell.seed).train
        model, lr = copy.deepcopy(self.base), self.task_rate
        options = {}
        if kind == "heads10":
            chosen = HeadSelection.random(find_heads(model), plan["ratio"], seed=self.cell.seed)
            options["heads"] = chosen.freeze(model)
            lr *= 10
        if kind == "data10":
            items = items[:max(1, len(items) // 10)]
        optimizer = self._optimizer(model.parameters(), lr, **options)
        self._fit(model, optimizer, items, plan["steps"], lr)
        return model

    def _one_run(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
        """A quarter of the steps on all heads, then the top ones go on and the others are restored."""
        everything = HeadSelection.all(find_heads(model)).freeze(model)
        optimizer = self._optimizer(model.parameters(), heads=everything)

        def select() -> None:
            self.heads = score_heads(self.base, model, metric=self.cell.metric,
                                     representation=self.cell.representation).top(self.cell.ratio)
            bound = self.heads.freeze(model)
            restore_start(everything, bound, dict(self.base.named_parameters()))
            optimizer.set_heads(bound)
            self.trained = bound.numel
            self.file_bytes = sum(p.numel * p.param.element_size() for p in bound.params)

        losses = self._fit(model, optimizer, self.items, self.plan["steps"], at={max(1, self.plan["steps"] // 4): select})
        return model, optimizer, losses

    def _fit(self, model: nn.Module, optimizer: torch.optim.Optimizer, items: list[Item], steps: int,
             lr: float | None = None, at: dict | None = None) -> list[float]:
        """The paper's recipe: warm-up, then cosine to a tenth; every loss in order."""
        plan, rng = self.plan, random.Random(self.cell.seed)
        peak, device, losses = lr or self.cell.lr, next(model.parameters()).device, []
        warmup = max(1, round(plan["warmup_ratio"] * steps))
        clock = time.process_time if device.type == "cpu" else time.perf_counter  # others may be at work on the cores
        times = [clock()]
        model.train()
        for step in range(steps):
            if at and step in at:
                at[step]()
            rise = (step + 1) / warmup
            fall = (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
            for group in optimizer.param_groups:
                group["lr"] = peak * (rise if step < warmup else plan["final_lr"] + (1 - plan["final_lr"]) * fall)
            batch = collate(self.tokenizer, rng.choices(items, k=plan["batch"]))
            loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
            times.append(clock())
        self.step_ms = 1e3 * statistics.median(after - before for before, after in itertools.pairwise(times))
        return losses
