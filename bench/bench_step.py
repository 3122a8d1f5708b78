"""A whole training step, timed: sliced heads beside full fine-tuning, gradient masks, LoRA and SHiRA, in one run.

    python -m bench.bench_step [--case smollm2|llama8b] [--layers N] [--ratio R]

Forward, backward, optimizer step, gradients set to None. Peak memory is what a step allocates on top of
weights and optimizer state. The same random heads for every method that selects heads.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from bench.common import gate, table, write_each
from bench.counting import state_bytes
from bench.finetune_methods import FINETUNE_METHODS, LORA, SLICED
from bench.timing import Timed, Unavailable, timed_rows
from bench.workloads import WORKLOADS, Workload, prepared


def timed_step(workload: Workload, method: str, ratio: float) -> Timed:
    try:
        ready = prepared(workload, method, ratio)
    except ImportError as error:
        raise Unavailable(str(error)) from error

    def call() -> None:
        workload.loss(ready.model).backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad()

    return Timed(call, lambda: {"note": f"{ready.trained / 1e6:.1f}M elements train, "
                                        f"state {state_bytes(ready.optimizer) / 2**20:.1f} MiB"})


def parity(workload: Workload, ratio: float) -> None:
    """Sliced and unsliced heads have the same loss after two steps."""
    losses = []
    for method in ("HeadAdamW", SLICED):
        step = prepared(workload, method, ratio)
        for _ in range(2):
            workload.loss(step.model).backward()
            step.optimizer.step()
            step.optimizer.zero_grad()
        with torch.no_grad():
            losses.append(workload.loss(step.model).item())
    bound = 1e-5 if workload.dtype == torch.float32 else 1e-2
    gate(f"sliced training, {workload.name}", abs(losses[1] / losses[0] - 1) < bound,
         f"loss {losses[1]:.8g}, unsliced {losses[0]:.8g}")


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=WORKLOADS, default="llama8b" if cuda else "smollm2")
    parser.add_argument("--layers", type=int, help="default: 16 on a GPU, else all")
    parser.add_argument("--ratio", type=float, default=0.10)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    workload = WORKLOADS[args.case](args.layers or (16 if cuda else None), "cuda" if cuda else "cpu")
    parity(workload, args.ratio)
    # The one that ratios refer to first, so that every row can be written at once.
    methods = sorted((name for name in FINETUNE_METHODS if name != "frozen model"), key=lambda name: name != LORA)
    builders = {name: partial(timed_step, workload, name, args.ratio) for name in methods}
    print(workload.name)
    rows, path = write_each("step", timed_rows(f"{workload.name}, {args.ratio:.0%} of heads", builders, args.repeats))
    table(rows, ("rival", "median_ms", "p20_ms", "p80_ms", "ratio", "peak_mib", "launches", "note"))
    print(path)


if __name__ == "__main__":
    main()
