"""ALPS in one run beside the paper's two, on the same number of optimizer steps: what is learned, and the time.

`python -m bench.bench_one_run`. The task is short sums on SmolLM2; the two runs are `alps_finetune` (a task model of
all weights for the warm-up's steps, then the heads for the rest), the one run is `AlpsCallback`, with what the other
heads learned in the warm-up thrown away ("base") or kept ("keep"). One seed is one seed.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, tiny_model
from alps_kernels.integrations import unwrap_optimizer
from bench.counting import state_bytes

from .common import ENVIRONMENT, table, write_rows

MEASURED = ("case", "seed", "steps", "warmup", "lr", "task_lr", "exact_match", "test_loss", "seconds",
            "state_mib_peak", "state_mib_last", "heads", "heads_shared", "note")


def arguments(folder: Path, options: argparse.Namespace, **changes) -> TrainingArguments:
    return TrainingArguments(str(folder), **{
        "max_steps": options.steps, "per_device_train_batch_size": options.batch, "learning_rate": options.lr,
        "weight_decay": 0.1, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.1, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 10,
        "remove_unused_columns": False, "seed": options.seed, **changes})


def state_mib(optimizer) -> float:
    return state_bytes(unwrap_optimizer(optimizer)) / 2**20


class Watching(Trainer):
    """Notes the bytes of optimizer state after every step."""

    states: list[float]

    def training_step(self, *given, **named):
        if self.state.global_step:
            Watching.states.append(state_mib(self.optimizer))
        return super().training_step(*given, **named)


def measured(name: str, model, tokenizer, test, options, seconds: float, heads) -> dict:
    model.eval()
    with torch.no_grad():
        batches = [chain_sum.collate(tokenizer, test[at:at + 32]) for at in range(0, len(test), 32)]
        losses = [model(**batch).loss.item() * len(batch["labels"]) for batch in batches]
    return {"case": name, "seed": options.seed, "steps": options.steps, "warmup": options.warmup, "lr": options.lr,
            "task_lr": options.task_lr, "exact_match": chain_sum.exact_match(model, tokenizer, test),
            "test_loss": sum(losses) / len(test), "seconds": seconds, "state_mib_peak": max(Watching.states, default=0.0),
            "state_mib_last": Watching.states[-1] if Watching.states else 0.0, "heads": len(heads)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60, help="of each way in total")
    parser.add_argument("--warmup", type=int, default=20, help="of them before the heads are scored")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the heads, and of the one run's warm-up")
    parser.add_argument("--task-lr", type=float, default=1e-4, help="of the task model")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--test", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    set_seed(options.seed)
    base, tokenizer = tiny_model() if options.tiny else smollm2()
    train, test = chain_sum.split(n_train=4000, n_test=options.test, seed=options.seed)

    def collate(problems):
        return chain_sum.collate(tokenizer, problems)

    rows, chosen = [], {}
    Watching.states = []
    rows.append({**measured("base", base, tokenizer, test, options, 0.0, ()), "steps": 0, "warmup": 0})
    with tempfile.TemporaryDirectory() as folder:
        model, started, Watching.states = copy.deepcopy(base), time.perf_counter(), []
        run = alps.alps_finetune(
            model, train, folder, trainer=Watching, data_collator=collate, task_share=1.0, ratio=options.ratio,
            args=arguments(folder, options, max_steps=options.steps - options.warmup),
            task_args=arguments(folder, options, max_steps=options.warmup, learning_rate=options.task_lr))
        chosen["two runs"] = run.heads
        rows.append(measured("two runs", model, tokenizer, test, options, time.perf_counter() - started, run.heads))
        del run, model
        for restore in ("base", "keep"):
            name = f"one run, {restore}"
            model, started, Watching.states = copy.deepcopy(base), time.perf_counter(), []
            trainer = Watching(model, arguments(Path(folder) / restore, options), train_dataset=train, data_collator=collate)
            callback = alps.AlpsCallback(options.ratio, options.warmup, restore=restore)
            alps.use_heads(trainer, callback)
            trainer.train()
            chosen[name] = callback.heads
            rows.append(measured(name, model, tokenizer, test, options, time.perf_counter() - started, callback.heads))
            del trainer, model
    for row in rows:
        if row["case"] in chosen:
            row["heads_shared"] = len(chosen[row["case"]] & chosen["two runs"])
            row["note"] = "heads_shared: with those of the two runs"
    table(rows, MEASURED)
    print(write_rows("one_run", rows, (*ENVIRONMENT, "bench", *MEASURED)))


if __name__ == "__main__":
    main()
