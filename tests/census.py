"""python -m tests.census --task causal [--types a,b] [--json out.json]"""
from __future__ import annotations
import argparse, collections, json, os, sys, time
import torch
from tests import census_inputs, census_models, census_oracle as oracle


def examine(task: str, model_type: str) -> dict:
    started = time.perf_counter()
    row = {"task": task, "type": model_type, "verdict": "", "detail": []}
    try:
        row |= _examine(task, model_type)
    finally:
        row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _reason(error):
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _examine(task, model_type):
    from alps_kernels.layout import LayoutError
    from alps_kernels.locate import find_heads
    try:
        model, inputs, failure = census_models.tiny_model(task, model_type)
    except Exception as error:
        return {"verdict": "not instantiated", "detail": [_reason(error)]}
    oracle.randomize(model)
    recording = oracle.Recording()
    notes = ["forward: " + failure] if failure else []
    census_inputs.exercise(model, inputs, recording)
    try:
        layout = find_heads(model)
    except LayoutError as error:
        names = {m: n for n, m in model.named_modules()}
        return {"verdict": "refused", "detail": [str(error)[:300]], "attends": sorted({type(m).__name__ for m in recording.attends})}
    except Exception as error:
        return {"verdict": "WRONG", "detail": ["find_heads raised " + _reason(error)]}
    wrong = oracle.check_coverage(model, layout) + oracle.missed(model, recording, layout)
    unseen = []
    for layer in layout.layers:
        try:
            wrong += oracle.check_layer(model, recording, layer)
        except oracle.NotExercised as error:
            unseen.append(f"{layer.module}: {error}")
        except Exception as error:
            import traceback
            if os.environ.get("CENSUS_DEBUG"): traceback.print_exc()
            unseen.append(f"{layer.module}: oracle failed, {_reason(error)}")
    return {"verdict": "WRONG" if wrong else "unverified" if unseen else "located", "detail": wrong or unseen + notes,
            "layers": len(layout.layers), "unseen": len(unseen)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="causal")
    parser.add_argument("--types")
    parser.add_argument("--json")
    args = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    rows = []
    for t in args.types.split(",") if args.types else census_models.model_types(args.task):
        row = examine(args.task, t)
        rows.append(row)
        print(f"{t:28s} {row['verdict']:16s} {row['seconds']:5.1f}s {row.get('layers','')}", *row["detail"][:3], sep="  ", flush=True)
    print(collections.Counter(r["verdict"] for r in rows))
    if args.json:
        json.dump(rows, open(args.json, "w"), indent=1)

if __name__ == "__main__":
    main()
