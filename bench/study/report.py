"""The page docs/evidence.md and its figures, from the rows of the study alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from alps_kernels.scoring import new_figure

from .runs import NAMES, Runs, claims, interval, label, plain

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = "evidence"  # a folder beside the page
CONCLUSION = Path(__file__).with_name("conclusion.md")
FORGETTING = {"english_ppl": "English perplexity", "code_ppl": "code perplexity", "humaneval_loss": "HumanEval loss"}
Heads = set[tuple[int, int]]


def results_table(runs: Runs, task: str) -> list[str]:
    lines = ["| what trains | seeds | lr | exact match | answer loss | " + " | ".join(FORGETTING.values()) + " |",
             "|---|---|---|---|---|---|---|---|"]
    for which in runs.of_task(task):
        rows = list(runs.of[which].values())
        lines.append(f"| {label(which)} | {len(rows)} | {float(rows[0]['lr']):g} | {interval(runs.items(which)).say('%')} | "
                     + " | ".join(interval(runs.scalars(which, c)).say() for c in ("test_loss", *FORGETTING)) + " |")
    return lines


def costs(runs: Runs, task: str) -> list[str]:
    """What each method trains, keeps and writes; a step beside one of full fine-tuning."""
    clock = "CPU seconds" if all(row["device"].startswith("CPU") for row in runs.rows.values()) else "seconds"
    lines = [f"| what trains | parameters | optimizer state, MiB | file, MB | a step, {clock} | beside full fine-tuning |"
             " peak memory, MiB |", "|---|---|---|---|---|---|---|"]
    full = runs.mean(runs.find(task, "full"), "step_ms")
    one_run = runs.find(task, "alps", task_model="one_run")
    for which in [w for w in runs.of_task(task) if w[1] != "base" and (plain(w) or w == one_run)]:
        step, peak = runs.mean(which, "step_ms"), runs.mean(which, "peak_mib")
        lines.append(f"| {label(which)} | {runs.mean(which, 'trained') / 1e6:.2f} M | {runs.mean(which, 'state_bytes') / 2**20:.1f} | "
                     f"{runs.mean(which, 'file_bytes') / 1e6:.1f} | {step / 1e3:.3g} | {step / full:.2f} | "
                     f"{'not measured here' if np.isnan(peak) else f'{peak:.0f}'} |")
    return lines


def claims_table(runs: Runs, task: str) -> list[str]:
    """Each claim as a paired difference; it holds, or does not, only where the interval leaves zero out."""
    lines = ["| claim | seeds | exact match, difference in points | says | answer loss, difference | says |", "|---|---|---|---|---|---|"]
    for text, first, second in claims(runs, task):
        n = runs.common(first, second)
        if not n:
            lines.append(f"| {text} | 0 | not run | | | |")
            continue
        exact = interval(runs.items(first), runs.items(second))
        loss = interval(runs.scalars(first, "test_loss"), runs.scalars(second, "test_loss"))
        lines.append(f"| {text} | {n} | {exact.say('%')} | {exact.verdict(1, n)} | {loss.say()} | {loss.verdict(-1, n)} |")
    return lines


def forgetting_table(runs: Runs, task: str) -> list[str]:
    """ALPS less the other method: below zero, ALPS forgot less."""
    lines = ["| ALPS forgets less than | seeds | " + " | ".join(f"{name}, difference | says" for name in FORGETTING.values()) + " |",
             "|---|---|" + "---|---|" * len(FORGETTING)]
    alps = runs.find(task, "alps")
    for method in runs.plan["tasks"][task]:
        other = runs.find(task, method)
        n = runs.common(alps, other)
        if method == "alps" or not n:
            continue
        moved = [interval(runs.scalars(alps, column), runs.scalars(other, column)) for column in FORGETTING]
        lines.append(f"| {NAMES[method]} | {n} | " + " | ".join(f"{m.say()} | {m.verdict(-1, n)}" for m in moved) + " |")
    return lines


def overlaps(runs: Runs) -> list[str]:
    """How alike selections are: of different seeds, of other scores at the same seed, of other tasks; and by chance."""
    lines = ["| selections | pairs | shared, mean | by chance |", "|---|---|---|---|"]

    def add(text: str, pairs: Iterable[tuple[Heads, Heads]], ratio: float) -> None:
        shared = [len(a & b) / len(a) for a, b in pairs]
        if shared:
            lines.append(f"| {text} | {len(shared)} | {np.mean(shared):.0%} | {ratio:.0%} |")

    chosen = {which: {seed: {tuple(head) for head in json.loads(row["heads"])} for seed, row in by.items() if row["heads"]}
              for which, by in runs.of.items() if which[1] in ("alps", "random", "layer_consistent")}
    for which, by in chosen.items():
        if which[2] < 1:
            add(f"{which[0]}: {label(which)}, two seeds", itertools.combinations(by.values(), 2), which[2])
    for task in runs.plan["tasks"]:
        alps = runs.find(task, "alps")
        for which, by in chosen.items():
            if which[0] == task and which[1:3] == alps[1:3] and which != alps and not which[6]:
                add(f"{task}: {label(alps)} and {label(which)}, one seed",
                    [(by[seed], chosen[alps][seed]) for seed in by if seed in chosen.get(alps, {})], alps[2])
    for one, two in itertools.combinations([w for w in chosen if w == runs.find(w[0], "alps")], 2):
        add(f"{label(one)} of {one[0]} and of {two[0]}, one seed",
            [(by, chosen[two][seed]) for seed, by in chosen[one].items() if seed in chosen[two]], one[2])
    return lines


def swept(runs: Runs, task: str) -> list[str]:
    losses = runs.losses
    lines = ["| what trains | development loss at each learning rate |", "|---|---|"]
    for cell in runs.study.swept(task):
        cells, best = runs.study.sweep(cell, losses)
        done = [(c.lr, losses[c.key]) for c in cells if c.key in losses]
        if done:
            said = ", ".join(f"**{lr:g}: {loss:.3f}**" if lr == best else f"{lr:g}: {loss:.3f}" for lr, loss in done)
            lines.append(f"| {label(cell.variant)} | {said}{'' if best else ' (not finished)'} |")
    return lines


def draw(runs: Runs, task: str, folder: Path) -> list[str]:
    """The figures of one task; the names of those that could be drawn."""
    exact = any(runs.items(v) for v in runs.of_task(task))
    methods = [v for v in runs.of_task(task) if v[1] != "base"]
    values = {v: interval(runs.items(v)) if exact else interval(runs.scalars(v, "test_loss")) for v in methods}
    scale, what = (100, "exact match on held-out items, %") if exact else (1, "loss on held-out items, nats a token")
    where = f"{task}, {runs.plan['model']} {runs.plan['dtype']}, {runs.plan['steps']} steps of {runs.plan['batch']}"
    figure = new_figure(7.2, 1.4 + 0.22 * len(methods))
    axes = figure.add_subplot()
    order = sorted(methods, key=lambda v: values[v].mean * (1 if exact else -1))
    for place, which in enumerate(order):
        mean, low, high = (scale * x for x in values[which])
        ends = [[max(mean - low, 0)], [max(high - mean, 0)]] if np.isfinite(low) else None
        axes.errorbar(mean, place, xerr=ends, fmt="o", color="black", capsize=3)
    axes.set_yticks(range(len(order)), [label(v) for v in order], fontsize=7)
    axes.set(xlabel=f"{what}, mean and 95 % interval")
    axes.grid(axis="x", color="0.88")
    axes.set_axisbelow(True)
    axes.set_title(where, fontsize=9)
    figure.savefig(folder / f"{task}-methods.png", dpi=200)
    if task not in runs.plan["tasks"]:  # a few variants, to see what heads are worth on it
        return [f"{task}-methods.png"]
    figure = new_figure(6.4, 4.4)
    axes = figure.add_subplot()
    for index, which in enumerate(filter(plain, methods)):
        axes.scatter(runs.mean(which, "english_ppl"), scale * values[which].mean, marker="osD^vP*X<>h"[index % 11], s=60,
                     label=label(which), edgecolor="black", zorder=3)
    axes.set(xlabel="English perplexity (lower: less forgotten)", ylabel=what)
    axes.legend(fontsize=6)
    axes.grid(color="0.88", zorder=0)
    axes.set_axisbelow(True)
    axes.set_title(f"{task}: learned against forgotten, means over seeds", fontsize=9)
    figure.savefig(folder / f"{task}-forgetting.png", dpi=200)
    return [f"{task}-methods.png", f"{task}-forgetting.png"]


def write_report(profile: str, rows: dict[str, dict[str, str]], docs: Path = ROOT / "docs") -> None:
    runs = Runs(profile, rows)
    if not runs.of:
        raise SystemExit(f"no rows of profile {profile}: run `python -m bench.study run --profile {profile}` first")
    (docs / FIGURES).mkdir(parents=True, exist_ok=True)
    plan, some = runs.plan, list(runs.rows.values())[-1]
    wanted = list(runs.study.cells(runs.losses))
    lines = [
        "# Evidence", "",
        f"Generated by `python -m bench.study report --profile {profile}` from `bench/results/study.csv`; "
        f"`python -m bench.study run --profile {profile}` makes the rows and goes on where it stopped.", "",
        f"SmolLM2-135M ({plan['dtype']} weights with exact float32 masters), {plan['steps']} steps of {plan['batch']} items, "
        f"AdamW, weight decay {plan['weight_decay']}, warm-up and cosine to a tenth; the same steps, items and optimizer for every "
        "method; each method's, and each ratio's, learning rate swept at a seed of its own, until both neighbours of the best "
        f"were tried, and chosen on a development split. {plan['n_test']} held-out items. "
        f"{sum(c.key in runs.rows for c in wanted)} of {len(wanted)} cells of this profile have run, on {some['device']}, "
        f"torch {some['torch']}, {some['date']}. Intervals: 95 %; of exact match a bootstrap over seeds and items, of the "
        "rest Student's t over seeds.", ""]
    if CONCLUSION.exists() and profile != "tiny":
        lines += [CONCLUSION.read_text().strip(), ""]
    for task in dict.fromkeys(v[0] for v in runs.of if v[1] != "base"):
        lines += [f"## {task}", "", *results_table(runs, task), ""]
        lines += [f"![{name}]({FIGURES}/{name})\n" for name in draw(runs, task, docs / FIGURES)]
        if task in plan["tasks"]:
            lines += ["### What the paper claims, here", "",
                      "A claim is \"yes\" or \"no\" only where the interval leaves zero out, which by chance alone one in twenty does.", "", *claims_table(runs, task), "",
                      *forgetting_table(runs, task), "", "### What it costs", "", *costs(runs, task), "",
                      "### Learning rates", "", *swept(runs, task), ""]
    lines += ["## Are the same heads selected?", "", *overlaps(runs), ""]
    (docs / "evidence.md").write_text("\n".join(lines))
    print(f"wrote {docs / 'evidence.md'}")
