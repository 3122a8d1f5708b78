"""One training step counted: sliced heads beside full fine-tuning, gradient masks, LoRA and SHiRA.

    python -m bench.bench_counts [--layers N] [--ratio R ...] [--case smollm2|llama8b ...]

Bytes that autograd keeps for the backward pass (distinct storages, parameters and buffers not
counted), bytes of gradients and of optimizer state, FLOPs of the products that form weight
gradients, operations of the forward pass. SmolLM2-135M is the real model on the CPU (its
configuration with random weights where it cannot be fetched); the layers of Llama-3.1-8B are on the
meta device: shapes alone, nothing is computed. Counts do not depend on the machine.
"""

from __future__ import annotations

import argparse

from bench.common import ENVIRONMENT, gate, table, write_rows
from bench.counting import Step, count_step
from bench.finetune_methods import FINETUNE_METHODS, LORA, SLICED
from bench.shapes import RATIOS
from bench.workloads import WORKLOADS, Workload, prepared

COLUMNS = (*ENVIRONMENT, "bench", "case", "method", "ratio", "trained", "saved_bytes", "grad_bytes", "state_bytes",
           "dw_gflop", "backward_gflop", "forward_gflop", "forward_ops", "forward_bytes", "note")


def count(workload: Workload, method: str, ratio: float) -> Step:
    """One step, and not the first: the meta device excepted, where no step writes anything."""
    ready = prepared(workload, method, ratio)
    if not next(ready.model.parameters()).is_meta:
        loss = workload.loss(ready.model)
        if loss.requires_grad:
            loss.backward()
        ready.optimizer.step()
        ready.optimizer.zero_grad()
    return count_step(ready.model, lambda: workload.loss(ready.model), ready.optimizer, workload.tokens, ready.trained)


def counted(workload: Workload, ratios: tuple[float, ...]) -> tuple[list[dict], dict[tuple[str, float], Step]]:
    """Every method at 10 % of heads, the sliced one at every ratio."""
    steps, rows = {}, []
    for method in FINETUNE_METHODS:
        for ratio in sorted({*ratios, 0.10}) if method == SLICED else (0.10,):
            row = {"case": workload.name, "method": method, "ratio": ratio}
            if method in workload.absent:
                rows.append({**row, "note": f"not run: {workload.absent[method]}"})
                continue
            step = steps[method, ratio] = count(workload, method, ratio)
            rows.append({
                **row, "trained": step.trained, "saved_bytes": step.saved, "grad_bytes": step.grads,
                "state_bytes": step.state, "dw_gflop": step.backward.weight_flops / 1e9,
                "backward_gflop": step.backward.flops / 1e9, "forward_gflop": step.forward.flops / 1e9,
                "forward_ops": sum(step.forward.ops.values()), "forward_bytes": step.forward.written})
    return rows, steps


def check(workload: Workload, steps: dict[tuple[str, float], Step]) -> None:
    """What slicing promises, to the byte.

    Raises:
        SystemExit: a promise is broken; it says which.
    """
    element = workload.dtype.itemsize
    per_element = 8 if element == 4 else 10  # two float32 moments, and the low half of a 16-bit weight
    frozen, lora = steps["frozen model", 0.10], steps[LORA, 0.10]
    for (method, ratio), step in steps.items():
        if method != SLICED:
            continue
        at = f"{SLICED} at {ratio:.0%} of heads, {workload.name}"
        gate(f"gradients, {at}", step.grads == element * step.trained,
             f"{step.grads:,} bytes for {step.trained:,} elements of {element}")
        steps_own = step.state - per_element * step.trained  # the step counts: four bytes a tensor
        gate(f"state, {at}", 0 <= steps_own <= 4 * 4 * 1024,
             f"{per_element} bytes an element and {steps_own} of step counts")
        gate(f"weight-gradient FLOPs, {at}", step.backward.weight_flops == 2 * workload.tokens * step.trained,
             f"{step.backward.weight_flops:,} = 2 x {workload.tokens} tokens x elements")
        same = step.forward == frozen.forward
        gate(f"forward pass, {at}", same, "operations, FLOPs and bytes written as the frozen model's" if same else
             f"{step.forward} instead of {frozen.forward}")
    ours = steps[SLICED, 0.10].saved
    gate(f"saved bytes, {workload.name}", ours <= lora.saved, f"{ours:,} against LoRA's {lora.saved:,}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--ratio", nargs="+", type=float, default=RATIOS, help="of the sliced heads")
    args = parser.parse_args(argv)
    for name in args.case:
        workload = WORKLOADS[name](args.layers)
        rows, steps = counted(workload, tuple(args.ratio))
        check(workload, steps)
        print(workload.name)
        table(rows, ("method", "ratio", *COLUMNS[COLUMNS.index("trained"):]))
        print(write_rows("counts", rows, COLUMNS))


if __name__ == "__main__":
    main()
