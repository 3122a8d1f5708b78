"""Training curves by precision: the same heads, seed and batches of SmolLM2-135M, only the optimizer differs.

    python -m bench.bench_curves [--kind NAME ...] [--steps N] [--lr LR] [--layers N]

Task: chain_sum, short sums (alps_kernels/demo/chain_sum.py); a tenth of the heads, q/k/v, random. Every
run starts from the weights rounded to bfloat16, so that all start alike. The runs called bf16 hold
weights, activations and gradients in bfloat16; those called fp32 hold all of it in float32, so that
nothing but the moments tells them apart. Baselines train the leaves of `slice_heads`.

    distance   of the trained slices from the fp32 run's at the end, over the length of its way:
               |w - w_fp32| / |w_fp32 - w_start|, l2
    same       share of the trained weights that the run left as they were
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alps_kernels import HeadAdamW, HeadSelection, find_heads, slice_heads
from alps_kernels.demo import chain_sum
from bench.baselines import baseline
from bench.common import ENVIRONMENT, table, write_rows
from bench.counting import state_bytes
from bench.timing import Unavailable

COLUMNS = (*ENVIRONMENT, "bench", "case", "kind", "step", "loss", "test_loss", "distance", "same", "state_bytes",
           "note")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = "fp32"


@dataclass(frozen=True)
class Kind:
    """Weights in `dtype`, and ours (options of HeadAdamW) or a baseline's name."""

    dtype: torch.dtype
    options: dict | None = None
    baseline: str | None = None


KINDS = {
    FP32: Kind(torch.float32, {}),
    "bf16, split master": Kind(torch.bfloat16, {"master": "split"}),
    "bf16, kahan": Kind(torch.bfloat16, {"master": "kahan"}),
    "bf16, stochastic": Kind(torch.bfloat16, {"master": "stochastic"}),
    "bf16, none": Kind(torch.bfloat16, {"master": None}),
    "bf16, split master, 8-bit": Kind(torch.bfloat16, {"master": "split", "moment_dtype": "8bit"}),
    "fp32, 8-bit": Kind(torch.float32, {"moment_dtype": "8bit"}),
    "fp32, torchao 8-bit": Kind(torch.float32, baseline="torchao AdamW8bit"),
    "fp32, bitsandbytes 8-bit": Kind(torch.float32, baseline="bitsandbytes AdamW8bit"),
}


@dataclass
class Task:
    """Batches and held-out problems, the same for every run."""

    batches: list[dict[str, Tensor]]
    test: dict[str, Tensor]
    heads: HeadSelection
    lr: float


def prepared(layers: int | None, steps: int, batch: int, lr: float,
             seed: int = 0) -> tuple[Callable[[], nn.Module], Task]:
    """What gives a fresh model, and the task, both the same for every run."""
    from alps_kernels.demo.run import smollm2

    base, tokenizer = smollm2()
    if layers:
        base.model.layers = base.model.layers[:layers]
    base = base.bfloat16().float()
    train, test = chain_sum.split(n_train=4000, n_test=64, seed=seed)
    rng = random.Random(seed)
    batches = [chain_sum.collate(tokenizer, rng.sample(train, batch)) for _ in range(steps)]
    heads = HeadSelection.random(find_heads(base), 0.10, seed=seed)

    def fresh() -> nn.Module:
        return copy.deepcopy(base).to(DEVICE)

    return fresh, Task(batches, chain_sum.collate(tokenizer, test), heads, lr)


def train(model: nn.Module, kind: Kind, task: Task,
          say: Callable[[int, float, float | None], None]) -> tuple[Tensor, int]:
    """Train; the trained slices afterwards in float32, compact, and the bytes of optimizer state."""
    model = model.to(kind.dtype).train()
    bound = slice_heads(model, task.heads)
    if kind.baseline:
        optimizer = baseline(kind.baseline, [part.param for part in bound.params])
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.1
            group["lr"].fill_(task.lr) if isinstance(group["lr"], Tensor) else group.update(lr=task.lr)
    else:
        optimizer = HeadAdamW(model.parameters(), lr=task.lr, weight_decay=0.1, heads=bound, **kind.options)
    for step, batch in enumerate(task.batches):
        loss = model(**{k: v.to(DEVICE) for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = step + 1 == len(task.batches)
        say(step + 1, loss.item(), tested(model, task) if last or (step + 1) % 10 == 0 else None)
    return slices(bound), state_bytes(optimizer)


def slices(bound) -> Tensor:
    return torch.cat([part.param.detach().float().reshape(-1) for part in bound.params])


@torch.no_grad()
def tested(model: nn.Module, task: Task) -> float:
    model.eval()
    loss = model(**{k: v.to(DEVICE) for k, v in task.test.items()}).loss.item()
    model.train()
    return loss


def rows_of(name: str, case: str, fresh: Callable[[], nn.Module], task: Task, start: Tensor,
            end: Tensor | None) -> tuple[list[dict], Tensor | None]:
    """One run: a row for every step; the last one says how far the run came out from the fp32 one."""
    rows = []

    def say(step: int, loss: float, test: float | None) -> None:
        rows.append({"case": case, "kind": name, "step": step, "loss": loss, "test_loss": test})

    try:
        found, state = train(fresh(), KINDS[name], task, say)
    except (Unavailable, ValueError) as error:
        return [{"case": case, "kind": name, "note": f"not run: {error}"}], None
    end = found if end is None else end
    distance = (found - end).norm() / (end - start).norm()
    rows[-1] |= {"distance": distance.item(), "same": (found == start).float().mean().item(), "state_bytes": state}
    return rows, found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--layers", type=int, help="default: all")
    args = parser.parse_args(argv)
    fresh, task = prepared(args.layers, args.steps, args.batch, args.lr)
    model = fresh()
    start = slices(slice_heads(model, task.heads))
    case = (f"SmolLM2-135M, {len(model.model.layers)} of 30 layers, {len(task.heads)} heads, chain_sum, "
            f"batch {args.batch}, lr {args.lr:g} constant, weight decay 0.1, {DEVICE}")
    del model
    print(case)
    end, shown = None, []
    for name in [FP32, *(kind for kind in args.kind if kind != FP32)]:
        rows, found = rows_of(name, case, fresh, task, start, end)
        end = found if end is None else end
        path = write_rows("curves", rows, COLUMNS)
        shown.append(rows[-1])
        table(rows[-1:], ("kind", "step", "loss", "test_loss", "distance", "same", "state_bytes", "note"))
    table(shown, ("kind", "step", "loss", "test_loss", "distance", "same", "state_bytes", "note"))
    print(path)


if __name__ == "__main__":
    main()
