"""The main job: the whole method on one model, from a cheap task model to what it cost.

score the heads of a base model against a cheap task model, keep the top tenth, fine-tune the
base on those heads alone, and say what moved, what was learned and what was forgotten.
"""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import HeadAdamW
from ..scoring import curves, memory_bars, score_heads
from ..selection import BoundSelection
from ..tensors import write_json
from ..weights import ModelWeights
from . import chain_sum, text

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How much of everything the demonstration does; the defaults suit two CPU cores."""

    ratio: float = 0.10
    task_steps: int = 50
    task_lr: float = 1e-4
    head_steps: int = 60
    head_lr: float = 1e-3
    weight_decay: float = 0.1
    batch: int = 16
    n_test: int = 96
    windows: int = 4
    seed: int = 0


TINY = Plan(task_steps=12, task_lr=3e-3, head_steps=12, head_lr=1e-2, batch=16, n_test=16, windows=1)


def run_demo(out: Path, *, tiny: bool = False, device: str | None = None, plan: Plan | None = None,
             say: Say = print) -> dict[str, Any]:
    """Run the demonstration and write its files to the folder `out`.

    Args:
        tiny: a random model made on the spot, for machines without network and for CI.
        device: "cuda" or "cpu"; default: CUDA where there is one.
        say: what to do with each line of progress.

    Returns:
        The results, as written to `out`/results.json.

    Raises:
        demo.assets.AssetUnavailable: the model cannot be fetched.
    """
    plan = plan or (TINY if tiny else Plan())
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    say(f"model   {'a tiny random Llama' if tiny else 'SmolLM2-135M-Instruct'} on {device}, torch {torch.__version__}")
    base, tokenizer = tiny_model() if tiny else smollm2()
    base.to(device)
    train, test = chain_sum.split(n_train=4000, n_test=plan.n_test, seed=plan.seed)
    before = evaluate(base, tokenizer, test, plan)
    say(f"base    {line(before)}")

    task = copy.deepcopy(base)
    everything = torch.optim.AdamW(task.parameters(), lr=plan.task_lr, weight_decay=plan.weight_decay, fused=True)
    seconds, losses = {}, {}
    seconds["task model"], losses["every weight"] = fit(task, tokenizer, train, plan.task_steps, plan, everything)
    del everything
    full = evaluate(task, tokenizer, test, plan)
    say(f"task    {line(full)}   (all weights, {plan.task_steps} steps, {seconds['task model']:.0f} s)")

    started = time.perf_counter()
    # The two come from one folder: named apart, so that table and picture say which is which.
    scores = score_heads(ModelWeights(base, "tiny Llama" if tiny else "SmolLM2-135M-Instruct"),
                         ModelWeights(task, "task model on short sums"))
    seconds["score"] = time.perf_counter() - started
    del task
    heads = scores.top(plan.ratio)
    say(f"scores  {len(scores)} heads in {seconds['score']:.2f} s; kept {len(heads)}")
    scores.save(out / "scores.json")
    heads.save(out / "heads.json")
    scores.plot(out / "heads.png", heads=heads)

    snapshot = {name: param.detach().clone() for name, param in base.named_parameters()}
    bound = heads.freeze(base)
    say(f"train   {bound.count}")
    optimizer = HeadAdamW(base.parameters(), lr=plan.head_lr, weight_decay=plan.weight_decay, heads=bound)
    chosen = f"{len(heads)} heads"
    seconds["heads"], losses[chosen] = fit(base, tokenizer, train, plan.head_steps, plan, optimizer)
    after = evaluate(base, tokenizer, test, plan)
    say(f"heads   {line(after)}   ({len(heads)} heads, {plan.head_steps} steps, {seconds['heads']:.0f} s)")
    inside, outside = changed_bytes(base, snapshot, bound)
    state = state_bytes(optimizer)
    dense = 8 * sum(param.numel() for param in base.parameters())
    say(f"bytes   {outside} changed outside the selection, {inside:,} inside")
    say(f"state   {state / 2**20:.1f} MiB of optimizer state; AdamW over every weight holds {dense / 2**20:.0f} MiB")

    results = {
        "format": "alps_kernels.demo", "version": 1, "plan": asdict(plan), "tiny": tiny, "device": device,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "heads": {"all": len(scores), "kept": len(heads), "trained": bound.count.trained, "of": bound.count.total},
        "base": before, "task_model": full, "after": after, "seconds": seconds,
        "bytes_changed_outside": outside, "bytes_changed_inside": inside,
        "state_bytes": state, "adamw_state_bytes": dense, "losses": losses,
    }
    write_json(out / "results.json", results)
    draw(results, out)
    wrote = ("results.json", "scores.json", "heads.json", "heads.png", "losses.png", "memory.png")
    say(f"wrote   {', '.join(str(out / name) for name in wrote)}")
    return results


def smollm2() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from . import assets

    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def tiny_model() -> tuple[nn.Module, Any]:
    """A Llama of 4 layers with 8 query and 4 key/value heads, and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate([*alphabet, "</s>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=16, max_position_embeddings=512)
    return LlamaForCausalLM(config), tokenizer


def fit(model: nn.Module, tokenizer, train: list, steps: int, plan: Plan,
        optimizer: torch.optim.Optimizer) -> tuple[float, list[float]]:
    """Train for `steps`: 10 % warm-up, then cosine to 10 % of its learning rate (the paper's recipe).

    Returns:
        Seconds, and the loss of every step.
    """
    from tqdm import tqdm

    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng, device = random.Random(plan.seed), next(model.parameters()).device
    model.train()
    losses, started = [], time.perf_counter()
    for _ in (bar := tqdm(range(steps), leave=False, disable=None)):
        batch = {k: v.to(device) for k, v in chain_sum.collate(tokenizer, rng.sample(train, plan.batch)).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # allocating gradients anew costs a CPU more than clearing them
        scheduler.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return time.perf_counter() - started, losses


def draw(results: dict[str, Any], out: Path) -> None:
    """The pictures of a run: its training curves, and what gradients and optimizer state take."""
    named = "a tiny random Llama" if results["tiny"] else "SmolLM2-135M"
    lines = {f"{label}, lr {results['plan'][lr]:g}": list(enumerate(losses, start=1))
             for (label, losses), lr in zip(results["losses"].items(), ("task_lr", "head_lr"), strict=True)}
    curves(out / "losses.png", lines, title=f"{named} on short sums, batch {results['plan']['batch']}, "
           f"float32, {results['device']}, one seed")
    states = {"torch AdamW, every weight": results["adamw_state_bytes"],
              "HeadAdamW, selected heads": results["state_bytes"]}
    memory_bars(out / "memory.png", {name: {"optimizer state": size} for name, size in states.items()},
                title=f"{named}, optimizer state in float32")


def evaluate(model: nn.Module, tokenizer, test: list, plan: Plan) -> dict[str, float]:
    return {
        "exact_match": chain_sum.exact_match(model, tokenizer, test),
        "english_perplexity": text.perplexity(model, tokenizer, text.english(), windows=plan.windows),
        "code_perplexity": text.perplexity(model, tokenizer, text.code(), windows=plan.windows),
    }


def line(measured: dict[str, float]) -> str:
    return (f"exact match {measured['exact_match']:6.1%}   English perplexity {measured['english_perplexity']:7.2f}"
            f"   code perplexity {measured['code_perplexity']:7.2f}")


@torch.no_grad()
def changed_bytes(model: nn.Module, before: dict[str, Tensor], bound: BoundSelection) -> tuple[int, int]:
    """Bytes of the model that differ from `before`, (inside, outside) the selected slices."""
    parts = {part.name: part for part in bound.params}
    inside = outside = 0
    for name, param in model.named_parameters():
        differs = (param.detach().contiguous().view(-1).view(torch.uint8)
                   != before[name].contiguous().view(-1).view(torch.uint8)).view(param.numel(), -1).sum(1)
        differs = differs.view(param.shape)
        here = sum(int(block.sum()) for block in parts[name].blocks(differs)) if name in parts else 0
        inside += here
        outside += int(differs.sum()) - here
    return inside, outside


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values()
               if isinstance(value, Tensor))
