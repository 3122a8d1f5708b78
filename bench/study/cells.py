"""What the study consists of: one cell is one training run at one learning rate and seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).with_name("study.json")
HEAD_METHODS = ("alps", "alps_rest")  # those that select by scores


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        profile: the part of study.json that says how long and how large.
        task: what it trains on.
        method: full, no_attention, alps, alps_rest, random, layer_consistent, lora, shira.
        ratio: of heads that train, where heads are chosen.
        metric, representation: of the scores, where scores choose.
        task_model: what the scores compare the base with: "full", "data10" (trained on a tenth of the
            items), "heads10" (only a random tenth of the heads trained), "one_run" (the warm-up of this
            very run); "" where none is needed.
        heads_from: the task whose scores choose, where that is another one.
        lr: peak learning rate.
        seed: of the order of training items and of what is random in a method.
    """

    profile: str
    task: str
    method: str
    ratio: float = 0.0
    metric: str = ""
    representation: str = ""
    task_model: str = ""
    heads_from: str = ""
    lr: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        """Names the cell in the table and on the command line."""
        return "/".join(str(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) not in ("",))

    @property
    def variant(self) -> tuple:
        """What is compared: everything but learning rate and seed."""
        return (self.task, self.method, self.ratio, self.metric, self.representation, self.task_model, self.heads_from)


def dev_losses(rows: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """The loss on the development split, by the key of a cell."""
    return {key: float(row["dev_loss"]) for key, row in rows.items()}


@dataclass(frozen=True)
class Study:
    """A profile of study.json.

    Attributes:
        plan: its entries; `tasks` lists the methods of each task.
        rates: the learning rates that a method's sweep begins with, and the "ladder" it may go on along.
    """

    profile: str
    plan: dict[str, Any]
    rates: dict[str, list[float]]

    @classmethod
    def load(cls, profile: str) -> Study:
        """
        Raises:
            ValueError: there is no such profile.
        """
        document = json.loads(CONFIG.read_text())
        methods, rates = document.pop("methods"), document.pop("lr")
        if profile not in document:
            raise ValueError(f"no profile is called {profile!r}; there are {sorted(document)}")
        plan = document[profile]
        plan["tasks"] = {task: methods[which] for task, which in plan["tasks"].items()}
        return cls(profile, plan, rates)

    def first(self, task: str, method: str) -> Cell:
        """A method as it is first compared: the plan's ratio, PAD of `projection`, a full task model."""
        if method in HEAD_METHODS:
            return Cell(self.profile, task, method, self.plan["ratio"], "pad", "projection", "full")
        return Cell(self.profile, task, method, self.plan["ratio"] if method in ("random", "layer_consistent") else 0.0)

    # -- learning rates ----------------------------------------------------------------------

    def swept(self, task: str) -> Iterator[Cell]:
        """What has a sweep of its own: every method, and every other ratio."""
        yield from (self.first(task, method) for method in self.plan["tasks"][task])
        yield from self._ratios(task)

    def sweep(self, cell: Cell, losses: Mapping[str, float]) -> tuple[list[Cell], float | None]:
        """The runs of one sweep as far as it is known, and the rate it chooses once they have run.

        A sweep goes on along the ladder until both neighbours of the best rate have been tried, at a
        seed of its own; the loss on the development split decides.

        Args:
            losses: of the runs that are done, by the key of their cell.
        """
        ladder, tried = self.rates["ladder"], list(self.rates[cell.method])
        while True:
            runs = [replace(cell, lr=lr, seed=self.plan["sweep_seed"]) for lr in sorted(tried)]
            if any(run.key not in losses for run in runs):
                return runs, None
            best = min(runs, key=lambda run: losses[run.key] if losses[run.key] == losses[run.key] else math.inf).lr
            at = ladder.index(best)
            beside = [lr for lr in ladder[max(at - 1, 0):at + 2] if lr not in tried]
            if not beside:
                return runs, best
            tried += beside

    def chosen(self, losses: Mapping[str, float]) -> dict[tuple[str, str, float], float]:
        """The learning rate of (task, method, ratio), where its sweep has run."""
        found = {(c.task, c.method, c.ratio): self.sweep(c, losses)[1] for task in self.plan["tasks"] for c in self.swept(task)}
        found = {key: lr for key, lr in found.items() if lr is not None}
        for source, target in self.plan["transfer"]:  # a target has its source's
            found |= {(target, method, ratio): lr for (task, method, ratio), lr in found.items() if task == source}
        return found

    def task_rate(self, cell: Cell, chosen: Mapping[tuple[str, str, float], float]) -> float | None:
        """The learning rate of a cell's task model, that of full fine-tuning; 0.0 where it needs none."""
        if cell.task_model in ("", "one_run"):
            return 0.0
        return chosen.get((cell.heads_from or cell.task, "full", 0.0))

    # -- what runs ---------------------------------------------------------------------------

    def cells(self, losses: Mapping[str, float]) -> Iterator[Cell]:
        """Everything, most wanted first, as far as it is known which learning rates to take."""
        plan, chosen, tasks = self.plan, self.chosen(losses), list(self.plan["tasks"])

        def at(seeds: list[int], variants: Iterable[Cell]) -> Iterator[Cell]:
            for cell in variants:
                lr = chosen.get((cell.task, cell.method, cell.ratio))
                if lr is not None and self.task_rate(cell, chosen) is not None:
                    yield from (replace(cell, lr=lr, seed=seed) for seed in seeds)

        def methods(task: str) -> list[Cell]:
            return [self.first(task, method) for method in plan["tasks"][task]]

        def sweeps(variants: Iterable[Cell]) -> Iterator[Cell]:
            for cell in variants:
                if self.task_rate(cell, chosen) is not None:
                    yield from self.sweep(cell, losses)[0]

        for task in tasks:
            yield Cell(self.profile, task, "base")
            yield from sweeps(methods(task))
            yield from at(plan["first_seeds"], methods(task))
            if task in plan["wide"]:
                yield from at(plan["first_seeds"], self._metrics(task))
                yield from sweeps(self._ratios(task))
                yield from at(plan["first_seeds"], [*self._ratios(task), *self._task_models(task)])
            for source, target in plan["transfer"]:
                if source == task:
                    own = self.first(target, "alps")
                    yield from at(plan["first_seeds"], [replace(own, heads_from=source), own, self.first(target, "random")])
        for task in tasks:
            yield from at(plan["more_seeds"], methods(task))
            if task in plan["wide"]:
                yield from at(plan["more_seeds"], self._metrics(task))

    def _metrics(self, task: str) -> list[Cell]:
        alps = self.first(task, "alps")
        return [replace(alps, metric=metric, representation=representation) for metric, representation in self.plan["metrics"]]

    def _ratios(self, task: str) -> list[Cell]:
        return [replace(self.first(task, "alps"), ratio=r) for r in self.plan["ratios"] if task in self.plan["wide"]]

    def _task_models(self, task: str) -> list[Cell]:
        return [replace(self.first(task, "alps"), task_model=kind) for kind in self.plan["task_models"]]
