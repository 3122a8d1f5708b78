"""What the study consists of: one cell is one training run at one learning rate and seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
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


def load(profile: str) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """A profile of study.json and the learning rates to sweep.

    Raises:
        ValueError: there is no such profile.
    """
    document = json.loads(CONFIG.read_text())
    if profile not in document or profile == "lr":
        raise ValueError(f"no profile is called {profile!r}; there are {sorted(set(document) - {'lr'})}")
    return document[profile], document["lr"]


def of_method(profile: str, plan: dict[str, Any], task: str, method: str) -> Cell:
    """A method as it is first compared: the plan's ratio, PAD of `projection`, a full task model."""
    if method in HEAD_METHODS:
        return Cell(profile, task, method, plan["ratio"], "pad", "projection", "full")
    return Cell(profile, task, method, plan["ratio"] if method in ("random", "layer_consistent") else 0.0)


def sweep(profile: str, plan: dict[str, Any], rates: dict[str, list[float]]) -> Iterator[Cell]:
    """Every method at every learning rate, at a seed of its own: the rate is chosen on the development split."""
    for task in plan["tasks"]:
        for method in plan["methods"]:
            cell = of_method(profile, plan, task, method)
            for lr in rates[method]:
                yield altered(cell, lr=lr, seed=plan["sweep_seed"])


def main(profile: str, plan: dict[str, Any], chosen: dict[tuple[str, str], float]) -> Iterator[Cell]:
    """What is reported, most wanted first; `chosen`: the learning rate of (task, method) as far as known."""
    def at_seeds(cell: Cell) -> Iterator[Cell]:
        if (cell.task, cell.method) in chosen:
            for seed in plan["seeds"]:
                yield altered(cell, lr=chosen[cell.task, cell.method], seed=seed)

    for task in plan["tasks"]:
        for method in plan["methods"]:
            yield from at_seeds(of_method(profile, plan, task, method))
    for task in plan["tasks"]:
        alps = of_method(profile, plan, task, "alps")
        for metric, representation in plan["metrics"]:
            yield from at_seeds(altered(alps, metric=metric, representation=representation))
        for kind in plan["task_models"]:
            yield from at_seeds(altered(alps, task_model=kind))
        for ratio in plan["ratios"]:
            yield from at_seeds(altered(alps, ratio=ratio))
    for source, target in plan["transfer"]:
        for heads_from in (source, ""):
            cell = altered(of_method(profile, plan, target, "alps"), heads_from=heads_from)
            for seed in plan["seeds"]:
                if (source, "alps") in chosen:
                    yield altered(cell, lr=chosen[source, "alps"], seed=seed)


def altered(cell: Cell, **changes: Any) -> Cell:
    return Cell(**{f.name: changes.get(f.name, getattr(cell, f.name)) for f in fields(cell)})
