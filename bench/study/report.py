"""The page docs/evidence.md and its figures, from the rows of the study alone."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from alps_kernels import pictures

from . import cells

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = "evidence"  # a folder beside the page
CONCLUSION = Path(__file__).with_name("conclusion.md")
DRAWS = 10_000
Variant = tuple
NAMES = {"base": "base, untrained", "full": "full fine-tuning", "no_attention": "all but the heads' q/k/v",
         "alps": "ALPS", "alps_rest": "ALPS, rest trainable", "random": "random heads",
         "layer_consistent": "layer-consistent heads", "lora": "LoRA r=128 on q/k/v", "shira": "SHiRA on q/k/v"}


class Runs:
    """Rows by variant and seed."""

    def __init__(self, profile: str, rows: dict[str, dict[str, str]]) -> None:
        self.plan, self.rates = cells.load(profile)
        mine = [row for row in rows.values() if row["profile"] == profile]
        self.rows = mine
        self.of: dict[Variant, dict[int, dict[str, str]]] = defaultdict(dict)
        for row in mine:
            if row["method"] == "base" or int(row["seed"]) != self.plan["sweep_seed"]:
                self.of[variant(row)][int(row["seed"])] = row

    def find(self, task: str, method: str, **changes) -> Variant:
        cell = cells.of_method("", self.plan, task, method)
        return cells.altered(cell, **changes).variant

    def values(self, which: Variant, column: str) -> dict[int, float]:
        return {seed: float(row[column]) for seed, row in self.of.get(which, {}).items() if row[column] not in ("", "nan")}


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
        text += {"data10": ", task model on a tenth of the data", "heads10": ", task model of random heads",
                 "one_run": ", one run"}[task_model]
    return text + (f", heads of {heads_from}" if heads_from else "")


def interval(first: dict[int, np.ndarray], second: dict[int, np.ndarray] | None = None) -> tuple[float, float, float]:
    """Mean and 95 % interval of `first`, or of `first` - `second` on the seeds and items of both.

    Of items (exact match): a bootstrap of two levels, seeds drawn with replacement, then items. Of
    one number a seed: Student's t over seeds; infinite for a single seed.
    """
    seeds = sorted(set(first) & set(second)) if second is not None else sorted(first)
    if not seeds:
        return (np.nan,) * 3
    data = np.stack([first[s] - (second[s] if second is not None else 0) for s in seeds]).astype(float)
    mean = float(data.mean())
    if data.shape[1] == 1:
        if len(seeds) == 1:
            return mean, -np.inf, np.inf
        from scipy.stats import t

        half = float(t.ppf(0.975, len(seeds) - 1)) * data[:, 0].std(ddof=1) / len(seeds)**0.5
        return mean, mean - half, mean + half
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(seeds), size=(DRAWS, len(seeds)))
    # The mean over items of a draw of items, one draw for all seeds of a repetition.
    weights = rng.multinomial(data.shape[1], np.full(data.shape[1], 1 / data.shape[1]), size=DRAWS) / data.shape[1]
    means = np.einsum("dsi,di->d", data[drawn], weights, optimize=True) / len(seeds)
    return mean, *map(float, np.quantile(means, [0.025, 0.975]))


def items(runs: Runs, which: Variant) -> dict[int, np.ndarray]:
    return {seed: np.array([bit == "1" for bit in row["right"]], dtype=float)
            for seed, row in runs.of.get(which, {}).items() if row["right"]}


def scalars(runs: Runs, which: Variant, column: str) -> dict[int, np.ndarray]:
    return {seed: np.array([value]) for seed, value in runs.values(which, column).items()}


def _say(value: tuple[float, float, float], unit: str = "") -> str:
    if np.isnan(value[0]):
        return ""
    scale, digits = (100, 1) if unit == "%" else (1, 3)
    mean, low, high = (scale * v for v in value)
    return f"{mean:.{digits}f}{unit}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else "")


def results_table(runs: Runs, task: str) -> list[str]:
    lines = ["| what trains | seeds | lr | exact match | answer loss | English perplexity | code perplexity | trained | state MiB |",
             "|---|---|---|---|---|---|---|---|---|"]
    for which in [v for v in runs.of if v[0] == task]:
        rows = list(runs.of[which].values())
        lines.append(f"| {label(which)} | {len(rows)} | {float(rows[0]['lr']):g} | {_say(interval(items(runs, which)), '%')} | "
                     + " | ".join(_say(interval(scalars(runs, which, c))) for c in ("test_loss", "english_ppl", "code_ppl"))
                     + f" | {float(rows[0]['trained']) / 1e6:.2f} M | {float(rows[0]['state_bytes'] or 0) / 2**20:.1f} |")
    return lines


def claims(runs: Runs, task: str) -> list[str]:
    """Each claim as a paired difference; it holds, or does not, only where the interval leaves zero out."""
    alps = runs.find(task, "alps")
    comparisons = [
        ("10 % of heads beat full fine-tuning", alps, runs.find(task, "full")),
        ("ALPS heads beat random heads", alps, runs.find(task, "random")),
        ("ALPS heads beat layer-consistent heads", alps, runs.find(task, "layer_consistent")),
        ("ALPS beats LoRA r=128", alps, runs.find(task, "lora")), ("ALPS beats SHiRA", alps, runs.find(task, "shira")),
        ("training the rest too is better", runs.find(task, "alps_rest"), alps),
        *((f"PAD of projection beats {m} of {r}", alps, runs.find(task, "alps", metric=m, representation=r))
          for m, r in runs.plan["metrics"]),
        *((f"{kind.replace('data10', 'a task model on a tenth of the data').replace('one_run', 'one run').replace('heads10', 'a task model of random heads')}"
           " does as well (difference to a full task model)", runs.find(task, "alps", task_model=kind), alps)
          for kind in runs.plan["task_models"]),
        *((f"{ratio:.0%} of heads is better than {runs.plan['ratio']:.0%}", runs.find(task, "alps", ratio=ratio), alps)
          for ratio in runs.plan["ratios"]),
    ]
    for source, target in runs.plan["transfer"]:
        if source == task:
            comparisons.append((f"heads of {source} do as well on {target} as its own",
                                runs.find(target, "alps", heads_from=source), runs.find(target, "alps")))
    lines = ["| claim | seeds | exact match, difference in points | says | answer loss, difference | says |", "|---|---|---|---|---|---|"]
    for text, first, second in comparisons:
        n = len(set(runs.of.get(first, {})) & set(runs.of.get(second, {})))
        if not n:
            lines.append(f"| {text} | 0 | not run | | | |")
            continue
        exact = interval(items(runs, first), items(runs, second))
        loss = interval(scalars(runs, first, "test_loss"), scalars(runs, second, "test_loss"))
        lines.append(f"| {text} | {n} | {_say(exact, '%')} | {_verdict(exact, 1, n)} | {_say(loss)} | {_verdict(loss, -1, n)} |")
    for column, what in (("english_ppl", "English"), ("code_ppl", "code")):
        for other in ("full", "lora", "random", "no_attention"):
            second = runs.find(task, other)
            n = len(set(runs.of.get(alps, {})) & set(runs.of.get(second, {})))
            if n > 1:
                moved = interval(scalars(runs, alps, column), scalars(runs, second, column))
                lines.append(f"| less forgetting than {NAMES[other]}: {what} perplexity, difference | {n} | {_say(moved)} | "
                             f"{_verdict(moved, -1, n)} | | |")
    return lines


def _verdict(value: tuple[float, float, float], better: int, seeds: int) -> str:
    if seeds < 3:
        return "too few seeds"
    _, low, high = (better * v for v in value)
    low, high = min(low, high), max(low, high)
    return "yes" if low > 0 else "no" if high < 0 else "undecided"


def overlaps(runs: Runs, task: str) -> list[str]:
    """How alike the selections of different seeds are, against what chance gives."""
    lines = ["| heads by | seeds | shared by two seeds, mean | by chance |", "|---|---|---|---|"]
    for which in [v for v in runs.of if v[0] == task and v[1] in ("alps", "random", "layer_consistent")]:
        chosen = {s: {tuple(h) for h in json.loads(r["heads"])} for s, r in runs.of[which].items() if r["heads"]}
        if len(chosen) < 2:
            continue
        shared = [len(a & b) / len(a) for a, b in itertools.combinations(chosen.values(), 2)]
        lines.append(f"| {label(which)} | {len(chosen)} | {np.mean(shared):.0%} | {which[2]:.0%} |")
    return lines


def swept(runs: Runs, task: str) -> list[str]:
    lines = ["| method | development loss at each learning rate |", "|---|---|"]
    for method in runs.plan["methods"]:
        at = {float(r["lr"]): float(r["dev_loss"]) for r in runs.rows
              if r["task"] == task and r["method"] == method and int(r["seed"]) == runs.plan["sweep_seed"]}
        if at:
            best = min(at, key=at.get)
            edge = " (at the edge of what was tried)" if best in (min(at), max(at)) else ""
            lines.append(f"| {NAMES[method]}{edge} | " + ", ".join(f"{'**' if lr == best else ''}{lr:g}: {loss:.3f}{'**' if lr == best else ''}"
                                                          for lr, loss in sorted(at.items())) + " |")
    return lines


def draw(runs: Runs, task: str, folder: Path) -> list[str]:
    """The figures of one task; the names of those that could be drawn."""
    figure = pictures._figure(7.2, 4.2)
    axes = figure.add_subplot()
    methods = [v for v in runs.of if v[0] == task and items(runs, v)]
    marks = [interval(items(runs, v)) for v in methods]
    order = sorted(range(len(methods)), key=lambda i: marks[i][0])
    for place, i in enumerate(order):
        mean, low, high = (100 * x for x in marks[i])
        axes.errorbar(mean, place, xerr=[[max(mean - low, 0)], [max(high - mean, 0)]], fmt="o", color="black", capsize=3)
    axes.set_yticks(range(len(order)), [label(methods[i]) for i in order], fontsize=7)
    axes.set(xlabel="exact match on held-out items, %, mean and 95 % bootstrap interval")
    axes.grid(axis="x", color="0.88")
    axes.set_axisbelow(True)
    axes.set_title(f"{task}, {runs.plan['model']} {runs.plan['dtype']}, {runs.plan['steps']} steps of {runs.plan['batch']}",
                   fontsize=9)
    pictures._write(figure, folder / f"{task}-methods.png")
    figure = pictures._figure(6.4, 4.4)
    axes = figure.add_subplot()
    for index, which in enumerate(v for v in methods if v[1] in NAMES and v[5] in ("", "full") and v[3] in ("", "pad")):
        x, y = (np.mean(list(runs.values(which, c).values())) for c in ("english_ppl", "exact_match"))
        axes.scatter(x, 100 * y, marker="osD^vP*X<>h"[index % 11], s=60, label=label(which), edgecolor="black", zorder=3)
    axes.set(xlabel="English perplexity (lower: less forgotten)", ylabel="exact match, %")
    axes.legend(fontsize=6)
    axes.grid(color="0.88", zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(f"{task}: learned against forgotten, means over seeds", fontsize=9)
    pictures._write(figure, folder / f"{task}-forgetting.png")
    return [f"{task}-methods.png", f"{task}-forgetting.png"]


def write_report(profile: str, rows: dict[str, dict[str, str]], docs: Path = ROOT / "docs") -> None:
    runs = Runs(profile, rows)
    if not runs.of:
        raise SystemExit(f"no rows of profile {profile}: run `python -m bench.study run --profile {profile}` first")
    (docs / FIGURES).mkdir(parents=True, exist_ok=True)
    plan, some = runs.plan, runs.rows[-1]
    chosen = {(t, m): 0.0 for t in plan["tasks"] for m in plan["methods"]}
    wanted = 1 + sum(1 for _ in cells.sweep(profile, plan, runs.rates)) + sum(1 for _ in cells.main(profile, plan, chosen))
    lines = [
        "# Evidence", "",
        f"Generated by `python -m bench.study report --profile {profile}` from `bench/results/study.csv`; "
        f"`python -m bench.study run --profile {profile}` makes the rows and goes on where it stopped.", "",
        f"SmolLM2-135M ({plan['dtype']} weights with exact float32 masters), {plan['steps']} steps of {plan['batch']} items, "
        f"AdamW, weight decay {plan['weight_decay']}, warm-up and cosine to a tenth; the same steps, items and optimizer for every "
        f"method, learning rates swept for each at a seed of its own and chosen on a development split. {plan['n_test']} held-out "
        f"items. {len(runs.rows)} of {wanted} cells of this profile have run, on {some['device']}, torch {some['torch']}, "
        f"{some['date']}. Intervals: 95 %; of exact match a bootstrap over seeds and items, of the rest Student's t over seeds.", ""]
    if CONCLUSION.exists() and profile != "tiny":
        lines += [CONCLUSION.read_text().strip(), ""]
    for task in dict.fromkeys(v[0] for v in runs.of):
        figures = draw(runs, task, docs / FIGURES)
        lines += [f"## {task}", "", *results_table(runs, task), ""]
        lines += [f"![{name}]({FIGURES}/{name})\n" for name in figures]
        if task in plan["tasks"]:
            lines += ["### What the paper claims, here", "",
                      "A claim is \"yes\" or \"no\" only where the interval leaves zero out.", "", *claims(runs, task), "",
                      "### Do seeds select the same heads?", "", *overlaps(runs, task), "",
                      "### Learning rates", "", *swept(runs, task), ""]
    (docs / "evidence.md").write_text("\n".join(lines))
    print(f"wrote {docs / 'evidence.md'}")
