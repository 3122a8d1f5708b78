"""Which of transformers' model types `find_heads` locates, checked by an independent oracle.

    python -m tests.census --task causal [--types llama,gpt2] [--json out.json]
    python -m tests.census --write-table

A type is "located" (every layer verified by behaviour), "unverified" (located, some layer could
not be run), "refused" (a `LayoutError` with its reason), "WRONG" (the oracle found a fault) or
"not instantiated" (transformers itself refuses a tiny configuration, or needs another package).
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import time
from pathlib import Path

import torch

from tests.census import inputs as census_inputs, models as census_models, oracle as census_oracle

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROWS, TABLE = DOCS / "census.json", DOCS / "compatibility.md"
VERDICTS = ("located", "unverified", "refused", "WRONG", "not instantiated")


def examine(task: str, model_type: str) -> dict:
    """One type's row: verdict, detail lines, sorts of layout, seconds."""
    started = time.perf_counter()
    row = {"task": task, "type": model_type, "verdict": "", "detail": [], "layers": 0, "sorts": []}
    row |= _examine(task, model_type)
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _examine(task: str, model_type: str) -> dict:
    from alps_kernels.layout import LayoutError, find_heads

    try:
        model, inputs, failure = census_models.tiny_model(task, model_type)
    except Exception as error:  # a missing package, or a configuration that cannot be small
        return {"verdict": "not instantiated", "detail": [census_inputs.reason(error)]}
    try:
        layout = find_heads(model)
    except LayoutError as error:
        return {"verdict": "refused", "detail": [str(error)]}
    except Exception as error:
        return {"verdict": "WRONG", "detail": ["find_heads raised " + census_inputs.reason(error)]}
    census_oracle.randomize(model)
    recording = census_oracle.Recording()
    census_inputs.exercise(model, inputs, recording)
    wrong = census_oracle.check_coverage(model, layout) + census_oracle.missed(model, recording, layout)
    unseen = []
    for layer in layout.layers:
        try:
            wrong += census_oracle.check_layer(model, recording, layer)
        except census_oracle.NotExercised as error:
            unseen.append(f"{layer.module}: {error}")
    verdict = "WRONG" if wrong else "unverified" if unseen else "located"
    return {"verdict": verdict, "detail": wrong or unseen + ([f"forward: {failure}"] if failure and unseen else []),
            "layers": len(layout.layers), "sorts": sorted({sort_of(layer) for layer in layout.layers})}


def sort_of(layer) -> str:
    """How a layer's projections are stored, in a few words."""
    held = {role: {p.param for unit in (*layer.heads, *layer.groups) for p in unit if p.role == role and not p.bias}
            for role in ("q", "q_rope", "gate", "k", "v")}
    dims = {p.dim for unit in (*layer.heads, *layer.groups) for p in unit if p.role in ("q", "k", "v") and not p.bias}
    if not layer.groups:
        sort = "keys and values of another layer"
    elif held["q"] & held["k"] & held["v"]:
        sort = "q, k and v in one parameter"
    elif held["k"] & held["v"]:
        sort = "latent (MLA): k and v expanded per head" if held["q_rope"] else "q apart, k and v in one parameter"
    elif held["q"] & held["k"]:
        sort = "q and k in one parameter"
    else:
        sort = "separate q, k and v"
    return sort + (", transposed" if dims == {1} else "") + (", gated query" if held["gate"] else "")


def table(document: dict) -> str:
    """The compatibility page for a census: summary, refusals, types by sort of layout."""
    rows = document["rows"]
    lines = ["# Compatibility", "",
             f"Written by `python -m tests.census --write-table` with transformers {document['transformers']}, {document['date']}. "
             "Every model type that transformers registers for a task is made tiny and random; each slice that `find_heads` claims is "
             "perturbed, and the input of the output projection must move in exactly the claimed columns (`tests/census/oracle.py`). "
             "*Unverified*: located, but some layer cannot be run on a CPU without the model's own inputs.", "",
             "| task | types | run | located and verified | located, unverified | refused | wrong |", "|---|---|---|---|---|---|---|"]
    for task in dict.fromkeys(row["task"] for row in rows):
        count = collections.Counter(row["verdict"] for row in rows if row["task"] == task)
        lines.append(f"| {task} | {sum(count.values())} | {sum(count.values()) - count['not instantiated']} | "
                     + " | ".join(str(count[v]) for v in VERDICTS[:4]) + " |")
    for verdict, title in (("refused", "Refused, and why"), ("WRONG", "Wrong"), ("unverified", "Located but not verified"),
                           ("not instantiated", "Could not be made small")):
        found = [row for row in rows if row["verdict"] == verdict]
        if found:
            lines += ["", f"## {title}", "", "| task | type | reason |", "|---|---|---|"]
            lines += [f"| {row['task']} | `{row['type']}` | {_cell(row['detail'])} |" for row in found]
    lines += ["", "## Located, by how the projections are stored", "",
              "A type stands in every line that one of its towers belongs to.", "", "| sort | types |", "|---|---|"]
    sorts = collections.defaultdict(set)
    for row in rows:
        if row["verdict"] in ("located", "unverified"):
            for sort in row["sorts"]:
                sorts[sort].add(row["type"])
    for sort, types in sorted(sorts.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {sort} ({len(types)}) | {', '.join(f'`{t}`' for t in sorted(types))} |")
    return "\n".join(lines) + "\n"


def _cell(detail: list[str]) -> str:
    text = (detail or [""])[0].replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 240 else text[:237] + "..."


def census(tasks: list[str], types: list[str] | None) -> list[dict]:
    """Examine types one after another, printing a line for each."""
    rows = []
    for task in tasks:
        for model_type in types or census_models.model_types(task):
            row = examine(task, model_type)
            rows.append(row)
            print(f"{task:16} {model_type:30} {row['verdict']:16} {row['layers']:3d} layers {row['seconds']:5.1f} s",
                  *row["detail"][:3], sep="  ", flush=True)
        count = collections.Counter(row["verdict"] for row in rows if row["task"] == task)
        print(f"{task}: {sum(count.values())} types, " + ", ".join(f"{count[v]} {v}" for v in VERDICTS), flush=True)
    return rows


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=[*census_models.MAPPINGS, "all"], default="all")
    parser.add_argument("--types", help="comma-separated model types; all of the task's without")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--write-table", action="store_true", help="write docs/census.json and docs/compatibility.md")
    args = parser.parse_args()
    if args.write_table and (args.task != "all" or args.types):
        parser.error("--write-table takes the whole census: no --task, no --types")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = census(list(census_models.MAPPINGS) if args.task == "all" else [args.task], args.types and args.types.split(","))
    document = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
                "date": datetime.date.today().isoformat(), "rows": [{k: v for k, v in row.items() if k != "seconds"} for row in rows]}
    if args.json:
        args.json.write_text(json.dumps(document | {"rows": rows}, indent=1) + "\n")
    if args.write_table:
        DOCS.mkdir(exist_ok=True)
        ROWS.write_text(json.dumps(document, indent=1) + "\n")
        TABLE.write_text(table(document))
    raise SystemExit(any(row["verdict"] == "WRONG" for row in rows))


if __name__ == "__main__":
    main()
