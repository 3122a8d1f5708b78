"""Scoring two sharded bf16 checkpoints: time, and how much memory it adds to the process.

    python -m bench.bench_stream [--shape Llama-3.1-8B] [--layers 32] [--representation projection]

Writes two checkpoints of the shape's attention (other weights tiny) to a temporary folder, then
scores them in a fresh process. The peak counts everything resident, pages of mapped files too
(read from /proc, so on Linux only).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from .common import table, write_rows
from .shapes import SHAPES, Shape

LAYERS_PER_SHARD = 4


def write_checkpoint(folder: Path, shape: Shape, layers: int, seed: int, delta_seed: int | None = None) -> None:
    """A sharded bf16 Llama checkpoint; with `delta_seed` its weights are moved by 1e-4."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": shape.hidden,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim, "intermediate_size": 32, "vocab_size": 32}))
    rows = {"q": (shape.heads, 1), "k": (shape.groups, 1), "v": (shape.groups, 1), "o": (shape.heads, 0)}
    weight_map = {}
    for first in range(0, layers, LAYERS_PER_SHARD):
        file, tensors = f"model-{first:05d}.safetensors", {}
        for layer in range(first, min(first + LAYERS_PER_SHARD, layers)):
            for i, (name, (heads, by_rows)) in enumerate(rows.items()):
                size = (heads * shape.head_dim, shape.hidden) if by_rows else (shape.hidden, heads * shape.head_dim)
                weight = torch.randn(size, generator=torch.Generator().manual_seed(seed + 4 * layer + i)) * 0.02
                if delta_seed is not None:
                    weight += 1e-4 * torch.randn(size, generator=torch.Generator().manual_seed(delta_seed + 4 * layer + i))
                tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = weight.bfloat16()
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure_here(base: str, task: str, representation: str) -> dict[str, float]:
    """Score two folders in this process: seconds, heads, and MiB that the peak rose by."""
    import transformers  # noqa: F401  (libraries are loaded before the memory is read)
    from transformers import AutoModel, LlamaForCausalLM  # noqa: F401

    from alps_kernels import score_heads

    with tempfile.TemporaryDirectory() as folder:  # a first tiny run: nothing of the libraries is left to load
        tiny = Shape("tiny", 1, 64, 2, 1, 32)
        for name, moved in (("base", None), ("task", 9)):
            write_checkpoint(Path(folder) / name, tiny, 1, 0, moved)
        score_heads(Path(folder) / "base", Path(folder) / "task", representation=representation)
    start = time.perf_counter()
    peak, scores = peak_of(lambda: score_heads(base, task, representation=representation))
    return {"seconds": time.perf_counter() - start, "heads": len(scores), "peak_mib": peak}


def peak_of(fn: Callable[[], object]) -> tuple[float, object]:
    """MiB that a call adds to what is resident at most, and what it returns."""
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    result = fn()
    return resident_mib("VmHWM") - before, result


def resident_mib(field: str) -> float:
    """What /proc says is resident now (VmRSS) or was at most (VmHWM); Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 2**10


def in_fresh_process(base: Path, task: Path, representation: str = "projection") -> dict[str, float]:
    command = [sys.executable, "-m", "bench.bench_stream", "--measure", str(base), str(task), "--representation", representation]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--representation", default="projection")
    parser.add_argument("--measure", nargs=2, metavar=("BASE", "TASK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure_here(*args.measure, args.representation)))
        return
    shape = SHAPES[args.shape]
    layers = args.layers or shape.layers
    with tempfile.TemporaryDirectory() as folder:
        base, task = Path(folder) / "base", Path(folder) / "task"
        write_checkpoint(base, shape, layers, 0)
        write_checkpoint(task, shape, layers, 0, 10**6)
        found = in_fresh_process(base, task, args.representation)
    read = 2 * 2 * layers * shape.hidden * shape.head_dim * (shape.heads + 2 * shape.groups)  # q, k, v, bf16, two models
    rows = [{"case": f"{shape.name}, {layers} layers, {args.representation}", "rival": "score_heads, streamed",
             "median_ms": found["seconds"] * 1e3, "bytes": read, "gbps": read / found["seconds"] / 1e9,
             "peak_mib": found["peak_mib"], "note": f"{found['heads']} heads; peak is what scoring added to the process"}]
    table(rows, ("case", "rival", "median_ms", "gbps", "peak_mib", "note"))
    write_rows("stream", rows)


if __name__ == "__main__":
    main()
