"""Write the files of this folder with the code of commit 30eab94.

`test_old_files.py` loads them with the code of today. They were written once and are not written again:

    git worktree add /tmp/base 30eab94
    PYTHONPATH=/tmp/base python make.py OUT     # writes everything below OUT

The test imports the upper half of this file: it builds the same models, optimizers and runs, and
calls public names of `alps_kernels` only.

Results must not depend on the CPU. Therefore no weight comes from a forward or backward pass:
gradients are small multiples of 1/64, and the betas are 1/2 and 3/4. Products are then exact, and a
fused multiply-add gives the same bits as a multiplication and an addition.
"""

import copy
import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments,
)

import alps_kernels as alps

HERE = Path(__file__).resolve().parent
# Layer 0: both key/value groups of Llama, so k and v train whole. Layer 1: one of two groups.
HEADS = ((0, 1), (0, 2), (1, 3))
FEW = ((0, 1), (0, 3))
OTHER_HEADS = ((0, 0), (0, 1), (1, 3))
SECOND_PATCH = ((0, 3), (1, 0))
PROVENANCE = {"task": "integers", "nested": {"list": [1, 2.5, None, True]}}
BEFORE, AFTER = range(3), range(3, 5)  # steps before a state is saved, and after


# -- shared with the test ----------------------------------------------------------------------

def load(name: str, dtype: torch.dtype = torch.bfloat16, folder: Path = HERE) -> torch.nn.Module:
    """A base model, "llama" or "gpt2". Stored in bfloat16, which float32 holds exactly."""
    return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)


def pick(model: torch.nn.Module, heads=HEADS, **options) -> "alps.HeadSelection":
    """A selection of `heads` with the model's sizes."""
    layout = alps.find_heads(model)
    return alps.HeadSelection(heads, layout.heads_per_layer, **{"parts": ("q", "k", "v", "o"), "summary": layout.summary(),
                                                                **options})


def integers(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """The gradient of parameter `name` at `step`: multiples of 1/64 between -30/64 and 30/64."""
    count = torch.arange(shape.numel())
    return (((count * (7 + 2 * step) + crc32(name.encode()) % 61) % 61 - 30) / 64).view(shape)


def take_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps) -> None:
    for step in steps:
        for name, param in model.named_parameters():
            param.grad = integers(name, param.shape, step).to(param.dtype) if param.requires_grad else None
        optimizer.step()


@dataclass(frozen=True)
class Case:
    """A training run whose optimizer state is saved.

    Attributes:
        options: of HeadAdamW.
        heads: what trains.
        sliced: the model is sliced with `slice_heads`.
        first: the selection of the first two steps, where `set_heads` changed it.
        dense: the state is of torch.optim.AdamW.
        grouped: weights and vectors are in two param groups; what is in no head trains too.
    """

    model: str = "llama"
    dtype: torch.dtype = torch.bfloat16
    options: dict = field(default_factory=dict)
    heads: tuple = HEADS
    sliced: bool = False
    first: tuple | None = None
    dense: bool = False
    grouped: bool = False


CASES = {
    "float32": Case(dtype=torch.float32),
    "split": Case(options={"master": "split"}),
    "kahan": Case(options={"master": "kahan"}, heads=FEW),
    "stochastic": Case(options={"master": "stochastic", "moment_dtype": torch.bfloat16, "seed": 7}, heads=FEW),
    "8bit": Case("gpt2", options={"moment_dtype": "8bit"}),
    "amsgrad": Case(dtype=torch.float32, options={"amsgrad": True}, heads=FEW),
    "set_heads": Case(first=OTHER_HEADS),
    "dense": Case(dtype=torch.float32, heads=FEW, dense=True),
    "grouped": Case(options={"master": None, "moment_dtype": torch.bfloat16}, grouped=True),
    "gpt2": Case("gpt2", torch.float32),
    "sliced": Case(sliced=True),
    "gpt2_sliced": Case("gpt2", torch.float32, sliced=True),
}


def differing(model: torch.nn.Module, base: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are not those of the base."""
    old = base.state_dict()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not torch.equal(tensor, old[name])}


def digests(held: dict) -> dict[str, str]:
    """Type, shape and a digest of the bytes of every tensor in nested dicts, by path."""
    found = {}
    for key, value in held.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": text for name, text in digests(value).items()}
        else:
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[str(key)] = f"{value.dtype} {list(value.shape)} {sha256(raw).hexdigest()[:16]}"
    return found


def options_of(case: Case) -> dict:
    return {"lr": 1e-2, "betas": (0.5, 0.75), "weight_decay": 0.1, **case.options}


def start(case: Case, folder: Path = HERE) -> tuple[torch.nn.Module, "alps.HeadAdamW"]:
    """The base model and a new optimizer of a case, with its final selection."""
    model = load(case.model, case.dtype, folder)
    rest = "trainable" if case.grouped else "frozen"
    selection = pick(model, case.heads)
    bound = alps.slice_heads(model, selection) if case.sliced else selection.freeze(model, rest=rest)
    params = list(model.parameters())
    if case.grouped:
        params = [{"params": [p for p in params if p.ndim > 1]},
                  {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 1 / 64}]
    return model, alps.HeadAdamW(params, heads=bound, **options_of(case))


class IntegerTrainer(Trainer):
    """A Trainer on the samples 0, 1, 2 ... in order; sample i gives the gradients `integers(name, shape, i)`."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return sum((param.float() * integers(name, param.shape, int(inputs["step"]))).sum()
                   for name, param in model.named_parameters() if param.requires_grad)


def run(output: Path, resume: int | None = None, folder: Path = HERE) -> tuple[Trainer, "alps.AlpsCallback"]:
    """Six steps with AlpsCallback, which keeps two heads after the third; checkpoints after 2 and 4."""
    trainer = IntegerTrainer(
        load("llama", folder=folder), train_dataset=[{"step": i} for i in range(6)], args=TrainingArguments(
            str(output), max_steps=6, per_device_train_batch_size=1, learning_rate=1e-2, adam_beta1=0.5, adam_beta2=0.75,
            weight_decay=0.1, max_grad_norm=0.0, lr_scheduler_type="linear", save_steps=2, logging_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="no" if resume else "steps"))
    callback = alps.AlpsCallback(ratio=0.25, warmup_steps=3)
    alps.use_heads(trainer, callback)
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{resume}") if resume else None)
    return trainer, callback


# -- writing -----------------------------------------------------------------------------------

def save_model(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def write_bases(out: Path) -> None:
    configs = {
        "llama": (LlamaForCausalLM, LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=32, n_embd=16, n_inner=16, n_layer=2, n_head=4, n_positions=16,
                                             bos_token_id=0, eos_token_id=0)),
    }
    for name, (cls, config) in configs.items():
        torch.manual_seed(0)
        model = cls(config)
        with torch.no_grad():  # zeros and ones do not show what decays
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.02)
        save_model(model.bfloat16(), out / name)


def write_optimizers(out: Path) -> dict:
    (out / "optimizer").mkdir()
    expected = {}
    for name, case in CASES.items():
        base = load(case.model, case.dtype, out)
        model, optimizer = start(replace(case, heads=case.first or case.heads), out)
        if case.dense:  # every attention weight trains
            optimizer = torch.optim.AdamW(model.parameters(), **options_of(case))
        take_steps(model, optimizer, BEFORE[:2])
        if case.first:
            optimizer.set_heads(pick(model, case.heads).freeze(model))
        take_steps(model, optimizer, BEFORE[2:])
        saved = {"model": differing(model, base), "optimizer": copy.deepcopy(optimizer.state_dict())}
        if case.sliced:
            write_sliced(model, out)
        if case.dense:  # from here on HeadAdamW trains some heads
            weights = model.state_dict()
            model, optimizer = start(case, out)
            model.load_state_dict(weights)
            optimizer.load_state_dict(saved["optimizer"])
        take_steps(model, optimizer, AFTER)
        expected[name] = digests({"model": differing(model, base), "state": optimizer.state_dict()["state"]})
        torch.save(saved, out / "optimizer" / f"{name}.pt")
        if case.first:
            assert any(len(set(entry["step"].reshape(-1).tolist())) > 1 for entry in saved["optimizer"]["state"].values())
        if case.sliced:
            assert any("mirrored" in entry for entry in saved["optimizer"]["alps"]["params"].values())
    return expected


def write_sliced(model: torch.nn.Module, out: Path) -> None:
    """The weights of a sliced model: Llama as a folder, GPT-2 as a pickled state dict."""
    if model.config.model_type == "llama":
        save_model(model, out / "sliced")
    else:
        torch.save(model.state_dict(), out / "sliced.pt")


def tuned(base: torch.nn.Module, heads=HEADS) -> torch.nn.Module:
    model = copy.deepcopy(base)
    optimizer = alps.HeadAdamW(model.parameters(), heads=pick(model, heads).freeze(model), **options_of(Case()))
    take_steps(model, optimizer, range(2))
    return model


def write_heads(out: Path) -> dict:
    model = load("llama", folder=out)
    selections = {"heads": pick(model, kv="all", parts=("q", "v"), provenance=PROVENANCE),
                  "heads_without_summary": pick(model, kv="none", parts=("q", "k", "o"), summary=None)}
    for name, selection in selections.items():
        selection.save(out / f"{name}.json")
    return {name: selection.bind(model).numel for name, selection in selections.items()}


def write_scores(out: Path) -> dict:
    base = load("llama", torch.float32, out)
    task = tuned(tuned(base), SECOND_PATCH)
    expected = {}
    for metric, representation in (("pad", "projection"), ("kl", "qkv")):
        scores = alps.score_heads(base, task, metric=metric, representation=representation, temperature=0.5)
        scores.provenance["date"] = "2026-01-01T00:00:00+00:00"  # a second run writes the same bytes
        for suffix in ("json", "safetensors"):
            scores.save(out / f"scores_{metric}.{suffix}")
        expected[metric] = {"representation": representation, "hex": [value.hex() for value in scores.tensor.tolist()],
                            "ranking": scores.ranking(), "top": list(scores.top(0.3))}
    return expected


def write_patches(out: Path) -> dict:
    """Patches in memory, and two patches on a checkpoint folder, one after the other."""
    llama, gpt2 = load("llama", torch.float32, out), load("gpt2", folder=out)
    after = {"patch": tuned(llama), "patch_without_base": tuned(gpt2)}
    patches = {
        "patch": alps.save_patch(after["patch"], out / "patch.safetensors", base=llama, provenance=PROVENANCE),
        "patch_without_base": alps.save_patch(after["patch_without_base"], out / "patch_without_base.safetensors"),
        "first": alps.save_patch(tuned(load("llama", folder=out)), out / "first.safetensors", base=out / "llama"),
    }
    tensors = {name: differing(after[name], base) for name, base in (("patch", llama), ("patch_without_base", gpt2))}
    save_file({f"{name}/{key}": value for name, held in tensors.items() for key, value in held.items()},
              out / "tuned.safetensors")
    alps.export_sparse(patches["first"], out / "llama", out / "sparse")
    alps.export_merged(patches["first"], out / "llama", out / "once", keep_originals=True)  # as `alps patch apply`
    patches["second"] = alps.save_patch(tuned(load("once", folder=out), SECOND_PATCH), out / "second.safetensors",
                                        base=out / "once")
    alps.export_merged(patches["second"], out / "once", out / "patched", keep_originals=True)
    shutil.rmtree(out / "once")
    return {name: {"fingerprint": patch.fingerprint, "base_fingerprint": patch.base_fingerprint, "numel": patch.numel}
            for name, patch in patches.items()}


def write_run(out: Path) -> dict:
    trainer, callback = run(out / "run", folder=out)
    shutil.rmtree(out / "run" / "checkpoint-6")
    for file in (out / "run").rglob("*.*"):
        if file.name.startswith(("training_args", "rng_state", "generation_config")):  # a resume works without them
            file.unlink()
    values = sorted(callback.scores.tensor.tolist(), reverse=True)
    assert values[1] > 1.001 * values[2], "the choice of heads must not hang on the last bits of a score"
    return {"heads": list(callback.heads), "ranking": callback.scores.ranking(),
            "final": digests({"model": trainer.model.state_dict(), "state": trainer.optimizer.state_dict()["state"]})}


def main(out: Path) -> None:
    out.mkdir(parents=True)
    write_bases(out)
    expected = {"optimizers": write_optimizers(out), "heads": write_heads(out), "scores": write_scores(out),
                "patches": write_patches(out), "run": write_run(out)}
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(f"written by {alps.__file__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
