"""Rows of the study as numbers: values by seed, means with their intervals, and the claims that they speak on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .cells import Study, dev_losses

DRAWS = 10_000
Variant = tuple
Values = dict[int, np.ndarray]  # by seed: one entry per item, or one
NAMES = {"base": "base, untrained", "full": "full fine-tuning", "no_attention": "all but the heads' q/k/v",
         "alps": "ALPS", "alps_rest": "ALPS, rest trainable", "random": "random heads",
         "layer_consistent": "layer-consistent heads", "lora": "LoRA r=128 on q/k/v", "shira": "SHiRA on q/k/v"}
TASK_MODELS = {"data10": "task model on a tenth of the data", "heads10": "task model of random heads", "one_run": "one run"}


class Runs:
    """Rows of one profile by variant and seed; those of sweeps apart."""

    def __init__(self, profile: str, rows: dict[str, dict[str, str]]) -> None:
        self.study = Study.load(profile)
        self.plan = self.study.plan
        self.rows = {key: row for key, row in rows.items() if row["profile"] == profile}
        self.losses = dev_losses(self.rows)
        self.of: dict[Variant, dict[int, dict[str, str]]] = defaultdict(dict)
        for row in self.rows.values():
            if row["method"] == "base" or int(row["seed"]) != self.plan["sweep_seed"]:
                self.of[variant(row)][int(row["seed"])] = row

    def find(self, task: str, method: str, **changes) -> Variant:
        return replace(self.study.first(task, method), **changes).variant

    def of_task(self, task: str) -> list[Variant]:
        """In the order of the plan's methods, then as they ran."""
        methods = list(NAMES)
        found = [which for which in self.of if which[0] == task]
        plain = {self.find(task, method) for method in methods}
        return sorted(found, key=lambda which: (which not in plain, methods.index(which[1])))

    def items(self, which: Variant) -> Values:
        """Whether each held-out item was answered exactly."""
        return {seed: np.array([bit == "1" for bit in row["right"]], dtype=float)
                for seed, row in self.of.get(which, {}).items() if row["right"]}

    def scalars(self, which: Variant, column: str) -> Values:
        return {seed: np.array([float(row[column])]) for seed, row in self.of.get(which, {}).items()
                if row[column] not in ("", "nan")}

    def common(self, first: Variant, second: Variant) -> int:
        """How many seeds both have."""
        return len(set(self.of.get(first, {})) & set(self.of.get(second, {})))

    def mean(self, which: Variant, column: str) -> float:
        values = list(self.scalars(which, column).values())
        return float(np.mean(values)) if values else math.nan


def plain(which: Variant) -> bool:
    """Not of another score, representation, kind of task model or task's heads than a method is first compared with."""
    _, _, _, metric, representation, task_model, heads_from = which
    return metric in ("", "pad") and representation in ("", "projection") and task_model in ("", "full") and not heads_from


def variant(row: dict[str, str]) -> Variant:
    return (row["task"], row["method"], float(row["ratio"]), row["metric"], row["representation"], row["task_model"],
            row["heads_from"])


def label(which: Variant) -> str:
    _, method, ratio, metric, representation, task_model, heads_from = which
    text = NAMES.get(method, method)
    if ratio:
        text += f", {ratio:.0%}"
    if metric and (metric, representation) != ("pad", "projection"):
        text += f", {metric} of {representation}"
    if task_model not in ("", "full"):
        text += f", {TASK_MODELS[task_model]}"
    return text + (f", heads of {heads_from}" if heads_from else "")


class Interval(NamedTuple):
    """A mean and its 95 % interval; NaN where there is nothing to take it of."""

    mean: float
    low: float
    high: float

    def say(self, unit: str = "") -> str:
        if math.isnan(self.mean):
            return ""
        scale, digits = (100, 1) if unit == "%" else (1, 3)
        mean, low, high = (scale * v for v in self)
        return f"{mean:.{digits}f}{unit}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else "")

    def verdict(self, better: int, seeds: int) -> str:
        """Whether it lies on the side of `better` (1 above zero, -1 below) as a whole."""
        if math.isnan(self.mean):
            return ""
        if seeds < 3:
            return "too few seeds"
        low, high = sorted((better * self.low, better * self.high))
        return "yes" if low > 0 else "no" if high < 0 else "undecided"


def interval(first: Values, second: Values | None = None) -> Interval:
    """Mean and 95 % interval of `first`, or of `first` - `second` on the seeds and items of both.

    Of items (exact match): a bootstrap of two levels, seeds drawn with replacement, then items. Of
    one number a seed: Student's t over seeds; infinite for a single seed.
    """
    seeds = sorted(set(first) & set(second)) if second is not None else sorted(first)
    if not seeds:
        return Interval(math.nan, math.nan, math.nan)
    data = np.stack([first[s] - (second[s] if second is not None else 0) for s in seeds]).astype(float)
    mean = float(data.mean())
    if data.shape[1] == 1:
        if len(seeds) == 1:
            return Interval(mean, -math.inf, math.inf)
        from scipy.stats import t

        half = float(t.ppf(0.975, len(seeds) - 1)) * float(data[:, 0].std(ddof=1)) / len(seeds)**0.5
        return Interval(mean, mean - half, mean + half)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(seeds), size=(DRAWS, len(seeds)))
    # The mean over items of a draw of items, one draw for all seeds of a repetition.
    weights = rng.multinomial(data.shape[1], np.full(data.shape[1], 1 / data.shape[1]), size=DRAWS) / data.shape[1]
    shares = (drawn[:, :, None] == np.arange(len(seeds))).mean(1)  # of each seed in a draw
    means = np.einsum("ds,sd->d", shares, data @ weights.T)
    return Interval(mean, *map(float, np.quantile(means, [0.025, 0.975])))


class Claim(NamedTuple):
    """That `first` does better than `second`."""

    text: str
    first: Variant
    second: Variant


def claims(runs: Runs, task: str) -> Iterator[Claim]:
    """What the paper says of quality, as pairs to compare on one task."""
    def find(method: str, **changes) -> Variant:
        return runs.find(task, method, **changes)

    alps, plan = find("alps"), runs.plan
    yield Claim("10 % of heads beat full fine-tuning", alps, find("full"))
    yield Claim("ALPS heads beat random heads", alps, find("random"))
    if "layer_consistent" in plan["tasks"].get(task, ()):
        yield Claim("ALPS heads beat layer-consistent heads", alps, find("layer_consistent"))
    yield Claim("ALPS beats LoRA r=128", alps, find("lora"))
    if "shira" in plan["tasks"].get(task, ()):
        yield Claim("ALPS beats SHiRA", alps, find("shira"))
        yield Claim("ALPS beats training all but the heads' q/k/v", alps, find("no_attention"))
        yield Claim("training the rest too is better", find("alps_rest"), alps)
    if task in plan["wide"]:
        for metric, representation in plan["metrics"]:
            yield Claim(f"PAD of projection beats {metric} of {representation}", alps,
                        find("alps", metric=metric, representation=representation))
        for ratio in plan["ratios"]:
            yield Claim(f"{plan['ratio']:.0%} of heads beat {ratio:.0%}", alps, find("alps", ratio=ratio))
        for kind in plan["task_models"]:
            yield Claim(f"a full task model beats {TASK_MODELS[kind].replace('task model', 'one', 1)}" if kind != "one_run"
                        else "a full task model beats one run", alps, find("alps", task_model=kind))
    for source, target in plan["transfer"]:
        if source == task:
            moved = runs.find(target, "alps", heads_from=source)
            yield Claim(f"on {target}, heads of {source} beat its own", moved, runs.find(target, "alps"))
            yield Claim(f"on {target}, heads of {source} beat random ones", moved, runs.find(target, "random"))
