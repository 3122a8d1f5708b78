"""Pictures of the rows, for screen and black-and-white print; needs matplotlib.

Each title says on what its numbers were taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from alps_kernels.scoring import curves, memory_bars, new_figure

MARKS = "osD^vPX*<>"
LINES = ("-", "--", "-.", ":")
Row = dict[str, str]


def pictures(folder: Path, rows: dict[str, Sequence[Row]]) -> dict[str, list[str]]:
    """Draw what there are rows for; the names of the files by benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[str]] = {}
    for bench, draw in DRAWN.items():
        if rows.get(bench):
            drawn[bench] = draw(folder, bench, rows[bench])
    return drawn


def milliseconds(row: Row) -> float:
    """The median; where the cores were shared the 20th percentile."""
    return float(row["p20_ms"] if "shared" in row["device"] and row["p20_ms"] else row["median_ms"])


def by_share(folder: Path, bench: str, rows: Sequence[Row]) -> list[str]:
    """Time over the share of heads that train, a line for each rival; scattered heads, where there is more than one."""
    scattered = {found[1] for row in rows if (found := re.search(r"(\d+)% of heads scattered", row["case"]))}
    groups: dict[tuple, dict[str, dict[float, float]]] = {}
    for row in rows:
        found = re.search(r"(\d+)% of heads (\w+)", row["case"])
        if not row["median_ms"] or not found or (found[2] == "adjacent" and found[1] in scattered):
            continue
        parts = [part for part in row["case"].split(", ") if not re.search(r"of heads|elements|^\d+ of \d+$", part)]
        fixed = ", ".join(parts)
        lines = groups.setdefault((fixed, row["device"], row["torch"], row["date"]), {})
        lines.setdefault(row["rival"], {})[float(found[1])] = milliseconds(row)
    names = []
    for index, ((fixed, device, torch, date), lines) in enumerate(groups.items()):
        if len({share for points in lines.values() for share in points}) < 2:
            continue
        name = f"{bench}{f'-{index}' if index else ''}.png"
        _lines(folder / name, {rival: sorted(points.items()) for rival, points in lines.items()},
               "heads that train, %", "ms", f"{fixed}\n{device}, torch {torch}, {date}")
        names.append(name)
    return names


def bars(folder: Path, bench: str, rows: Sequence[Row]) -> list[str]:
    """Time by rival, a picture for each case that has times."""
    names, rows = [], [row for row in rows if row["median_ms"]]
    for index, case in enumerate(dict.fromkeys(row["case"] for row in rows)):
        group = [row for row in rows if row["case"] == case]
        name = f"{bench}{f'-{index}' if index else ''}.png"
        last = group[-1]
        _bars(folder / name, {row["rival"]: milliseconds(row) for row in group}, "ms",
              f"{case}\n{last['device']}, torch {last['torch']}, {last['date']}")
        names.append(name)
    return names


def memory(folder: Path, bench: str, rows: Sequence[Row]) -> list[str]:
    """Bytes of a step by method, a picture for each case."""
    names = []
    for index, case in enumerate(whole_models(rows)):
        parts = {row["method"]: {"gradients": float(row["grad_bytes"]), "optimizer state": float(row["state_bytes"]),
                                 "kept for the backward pass": float(row["saved_bytes"])}
                 for row in rows if row["case"] == case and row["saved_bytes"] and float(row["ratio"]) == 0.1
                 and row["method"] != "frozen model"}
        name = f"{bench}{f'-{index}' if index else ''}.png"
        model, *rest = case.split(", ")
        memory_bars(folder / name, parts, title=f"One training step, 10 % of heads, weights not counted\n"
                                                f"{model}, {rest[0]}\n{', '.join(rest[1:])}")
        names.append(name)
    return names


def whole_models(rows: Sequence[Row]) -> list[str]:
    """The cases whose model has all its layers."""
    return [case for case in dict.fromkeys(row["case"] for row in rows) if re.search(r"\b(\d+) of \1 layers", case)]


def training(folder: Path, bench: str, rows: Sequence[Row]) -> list[str]:
    """Loss curves: how 16-bit weights are kept, and how moments are."""
    last = rows[-1]
    names = []
    for name, about, member in (
            ("curves-weights.png", "16-bit weights", lambda kind: "8-bit" not in kind),
            ("curves-moments.png", "8-bit moments", lambda kind: kind == "fp32" or "8-bit" in kind)):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["case"] == last["case"] and row["loss"] and member(row["kind"]):
                lines.setdefault(row["kind"], []).append((float(row["step"]), float(row["loss"])))
        if len(lines) > 1:  # beside fp32
            model, *rest = last["case"].split(", ")
            curves(folder / name, lines, ylabel="loss of the batch",
                   title=f"{about}: {model}, {', '.join(rest[:3])}\n{', '.join(rest[3:])}\n"
                         f"same seed and batches, torch {last['torch']}, {last['date']}")
            names.append(name)
    return names


DRAWN: dict[str, Callable[[Path, str, Sequence[Row]], list[str]]] = {
    "adamw": by_share, "grad_norm": by_share, "dw": by_share, "score": bars, "step": bars, "counts": memory,
    "curves": training}


def _lines(path: Path, lines: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, title: str) -> None:
    from matplotlib.ticker import LogLocator

    figure = new_figure(6.8, 4.6 + 0.1 * len(lines))
    axes = figure.add_subplot()
    for index, (label, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), label=label, marker=MARKS[index % len(MARKS)], markersize=5,
                  linewidth=1.4, linestyle=LINES[index % len(LINES)], color="black" if index == 0 else f"C{index}")
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    shares = sorted({share for points in lines.values() for share, _ in points})
    axes.set_xticks(shares, [f"{share:g}" for share in shares])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(color="0.85", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    axes.set_title(title, fontsize=9, wrap=True)
    figure.savefig(path, dpi=160)


def _bars(path: Path, values: dict[str, float], xlabel: str, title: str) -> None:
    figure = new_figure(7.0, 1.4 + 0.4 * len(values))
    axes = figure.add_subplot()
    axes.barh(range(len(values)), list(values.values()), color="0.75", edgecolor="black", linewidth=0.6)
    for place, value in enumerate(values.values()):
        axes.text(value, place, f" {value:.4g}", va="center", fontsize=8)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    wide = max(values.values()) / min(values.values()) > 20
    axes.set(xlabel=f"{xlabel}{' (logarithmic)' if wide else ''}", xscale="log" if wide else "linear")
    axes.margins(x=0.15)
    axes.set_title(title, fontsize=9, wrap=True)
    figure.savefig(path, dpi=160)
