"""What a tuned tenth of the heads weighs as a file, beside LoRA and SHiRA, and how long a patch takes to come and go.

    python -m bench.bench_patch [--repeats N]

Files of SmolLM2-135M are written and their bytes counted; those of Llama-3.1-8B follow from the
numbers of values: 12 bytes a value for SHiRA (a float32 and two int32 indices, as PEFT saves it),
the named dtype's otherwise, headers not counted. Times are of the model in memory on this device.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import alps_kernels as alps
from bench.common import ENVIRONMENT, gate, measure, table, write_rows
from bench.shapes import SHAPES, Shape, heads_of

COLUMNS = (*ENVIRONMENT, "bench", "case", "form", "values", "file_bytes", "ratio", "median_ms", "p20_ms", "p80_ms", "note")
RANK = 128
TARGETS = ["q_proj", "k_proj", "v_proj"]


def load() -> nn.Module:
    from transformers import AutoModelForCausalLM

    from alps_kernels.demo import assets

    return AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.bfloat16).eval()


def tuned(base: nn.Module, heads: alps.HeadSelection) -> nn.Module:
    """A copy whose selected slices are others; how far they moved does not change a size or a time."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for part in heads.freeze(model).params:
            for block in part.blocks(part.param):
                block.add_(1e-3 * torch.randn_like(block))
    return model


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def adapter(base: nn.Module, config: object, folder: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Values and file bytes of a PEFT adapter."""
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), config)
    for param in (param for param in model.parameters() if param.requires_grad):
        param.data = torch.randn_like(param).to(dtype)
    model.save_pretrained(folder)
    trained = sum(param.numel() for param in model.parameters() if param.requires_grad)
    return trained, (folder / "adapter_model.safetensors").stat().st_size


def files(base: nn.Module, heads: alps.HeadSelection, folder: Path) -> list[dict]:
    """Rows of the sizes of real files, and of the times of the patch."""
    import peft

    case, path = "SmolLM2-135M, 10% of heads, q/k/v, bfloat16", folder / "patch.safetensors"
    model = tuned(base, heads)
    patch = alps.save_patch(model, path, base=base)
    size = path.stat().st_size
    rows = [{"case": case, "form": "head patch", "values": patch.numel, "file_bytes": size}]
    for rank in (None, 32):
        made = alps.export_lora(patch, base, folder / f"lora{rank}", rank=rank)
        rows.append({"case": case, "form": "its LoRA export, " + ("exact" if rank is None else f"rank {rank}") + ", float32",
                     "values": made.nbytes // 4, "file_bytes": (folder / f"lora{rank}" / "adapter_model.safetensors").stat().st_size})
    for name, config, dtype in ((f"LoRA r={RANK}, bfloat16", peft.LoraConfig(r=RANK, target_modules=TARGETS), torch.bfloat16),
                                (f"LoRA r={RANK}, float32", peft.LoraConfig(r=RANK, target_modules=TARGETS), torch.float32),
                                (f"SHiRA r={RANK}, float32", peft.ShiraConfig(r=RANK, target_modules=TARGETS), torch.float32)):
        values, found = adapter(base, config, folder / "adapter", dtype)
        rows.append({"case": case, "form": name, "values": values, "file_bytes": found})
    return [{**row, "ratio": row["file_bytes"] / size} for row in rows]


def formulas(shape: Shape, seeds: int = 20) -> list[dict]:
    """Rows of the sizes that follow from the shape; the patch's is the mean over random tenths of the heads."""
    case, share = f"{shape.name}, 10% of heads, q/k/v", shape.heads // shape.groups
    numels = []
    for seed in range(seeds):
        heads = heads_of(shape, 0.10, adjacent=False, seed=seed)
        groups = {(layer, head // share) for layer, head in heads}
        numels.append((len(heads) + 2 * len(groups)) * shape.head_dim * shape.hidden)
    values = sum(numels) // seeds
    low_rank = shape.layers * RANK * (3 * shape.hidden + (shape.heads + 2 * shape.groups) * shape.head_dim)
    rows = [("head patch, bfloat16", values, 2), (f"LoRA r={RANK}, bfloat16", low_rank, 2), (f"LoRA r={RANK}, float32", low_rank, 4),
            (f"SHiRA r={RANK}, float32", low_rank, 12)]
    return [{"case": case, "form": form, "values": n, "file_bytes": n * size, "ratio": n * size / (2 * values),
             "note": "by formula"} for form, n, size in rows]


def times(base: nn.Module, heads: alps.HeadSelection, folder: Path, repeats: int, note: str) -> list[dict]:
    paths = [folder / f"{name}.safetensors" for name in "ab"]
    models = [tuned(base, heads) for _ in paths]
    patches = [alps.save_patch(model, path, base=base) for model, path in zip(models, paths, strict=True)]
    before = copy.deepcopy(base)
    alps.apply_patch(base, paths[0])
    ok = equal(base, models[0])
    alps.apply_patch(base, paths[1], replace=True)
    ok = ok and equal(base, models[1])
    alps.revert_patch(base)
    gate("apply, swap and revert", ok and equal(base, before), "every byte")
    turn = [0]

    def swap() -> None:
        turn[0] ^= 1
        alps.apply_patch(base, patches[turn[0]], replace=True, verify=False)

    def there_and_back() -> None:
        alps.apply_patch(base, paths[0])
        alps.revert_patch(base)

    took = {"save": lambda: alps.save_patch(models[0], paths[0]), "apply from the file, all digests checked, and revert": there_and_back,
            "swap in memory, verify=False": swap}
    case = "SmolLM2-135M, 10% of heads, q/k/v, bfloat16"
    return [{"case": case, "form": form, "values": patches[0].numel,
             "note": note, **measure(call, repeats=repeats)} for form, call in took.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--note", default="", help="of the times")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    base = load()
    heads = alps.HeadSelection.random(alps.find_heads(base), 0.10)
    with tempfile.TemporaryDirectory() as folder:
        rows = files(base, heads, Path(folder)) + times(base, heads, Path(folder), args.repeats, args.note)
    rows += formulas(SHAPES["Llama-3.1-8B"])
    table(rows, ("case", "form", "values", "file_bytes", "ratio", "median_ms", "note"))
    print(write_rows("patch", rows, COLUMNS))


if __name__ == "__main__":
    main()
