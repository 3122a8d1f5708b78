"""Tasks with exact scorers, in splits that share no problem, and text to see what was forgotten."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from alps_kernels.demo import chain_sum, text

APART = 10**7  # between the seeds of two splits: item i of reasoning-gym is drawn from Random(seed + i)
IGNORED = -100
GYM = {  # reasoning-gym's own parameters
    "chain_sum_long": ("chain_sum", {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    "leg_counting": ("leg_counting", {"min_animals": 2, "max_animals": 3}),
    "word_sorting": ("word_sorting", {"min_words": 3, "max_words": 4}),
}
# Modules whose source trains ("stdlib"), and others that are held out; text.MODULES measure forgetting.
STDLIB_TRAIN = ("argparse", "ast", "calendar", "cmd", "codecs", "configparser", "contextlib", "dataclasses", "difflib",
                "enum", "fileinput", "fractions", "ftplib", "functools", "inspect", "json.decoder", "logging", "mailbox")
STDLIB_TEST = ("shutil", "statistics", "tarfile")


@dataclass(frozen=True)
class Item:
    """A prompt, the answer to train on, and the scorer of what a model says: 1.0 is exact."""

    prompt: str
    answer: str
    score: Callable[[str], float]


@dataclass(frozen=True)
class Splits:
    train: list[Item]
    dev: list[Item]
    test: list[Item]


def splits(task: str, n_train: int, n_dev: int, n_test: int, seed: int) -> Splits:
    """Training, development and test items without a common prompt; the test items do not depend on `seed`.

    Raises:
        ValueError: no such task.
        ImportError: the task is reasoning-gym's, which is not installed.
    """
    if task == "stdlib":
        return _stdlib(n_train, n_dev, n_test, seed)
    if task == "chain_sum":
        train, held_out = chain_sum.split(4200 - n_dev - n_test, n_dev + n_test, seed=0)
        random.Random(1).shuffle(held_out)
        items = [[Item(p.prompt, p.answer, _equals(p.answer)) for p in part] for part in (train, held_out)]
        random.Random(seed).shuffle(items[0])
        return Splits(items[0][:n_train], items[1][:n_dev], items[1][n_dev:])
    if task not in GYM:
        raise ValueError(f"no task is called {task!r}; there are {['chain_sum', 'stdlib', *GYM]}")
    test = _gym(task, n_test, 3 * APART, set())
    taken = {item.prompt for item in test}
    dev = _gym(task, n_dev, 2 * APART, taken)
    taken |= {item.prompt for item in dev}
    return Splits(_gym(task, n_train, (10 + seed) * APART, taken), dev, test)


def _gym(task: str, n: int, seed: int, taken: set[str]) -> list[Item]:
    """The first `n` items from `seed` whose prompt is neither in `taken` nor a duplicate, or all there are."""
    import reasoning_gym

    name, options = GYM[task]
    drawn = reasoning_gym.create_dataset(name, size=3 * n, seed=seed, **options)
    found: dict[str, Item] = {}
    for entry in drawn:
        prompt = entry["question"].strip() + (" =" if name == "chain_sum" and not entry["question"].rstrip().endswith("=") else "")
        if prompt not in taken and len(found) < n:
            found.setdefault(prompt, Item(prompt, entry["answer"], lambda said, e=entry: drawn.score_answer(said, e)))
    return list(found.values())


def _stdlib(n_train: int, n_dev: int, n_test: int, seed: int) -> Splits:
    """Stretches of 400 characters of Python's own source as answers to an empty prompt; scored by perplexity alone."""
    def pieces(modules: Sequence[str]) -> list[Item]:
        whole = "\n\n".join(inspect.getsource(import_module(name)) for name in modules)
        return [Item("", whole[at:at + 400], lambda said: 0.0) for at in range(0, len(whole) - 400, 400)]

    train, held_out = pieces(STDLIB_TRAIN), pieces(STDLIB_TEST)
    random.Random(seed).shuffle(train)
    random.Random(1).shuffle(held_out)
    return Splits(train[:n_train], held_out[:n_dev], held_out[n_dev:n_dev + n_test])


def _equals(answer: str) -> Callable[[str], float]:
    return lambda said: float(said == answer)


def collate(tokenizer, items: Sequence[Item]) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels, int64 [batch, tokens]; only answer and end of text bear a loss."""
    rows = []
    for item in items:
        prompt = tokenizer(item.prompt)["input_ids"] if item.prompt else []
        lead = " " if item.prompt else ""
        answer = tokenizer(lead + item.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.eos_token_id
    return {"input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows])}


@torch.no_grad()
def answers(model: nn.Module, tokenizer, items: Sequence[Item], batch: int = 64) -> list[float]:
    """The score of the greedy answer to every item, in order; an answer ends at end of text or of line."""
    device, scores = next(model.parameters()).device, [0.0] * len(items)
    model.eval()
    by_length: dict[int, list[int]] = {}
    prompts = [tokenizer(item.prompt)["input_ids"] for item in items]
    for index, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(index)  # equal lengths need no padding
    new = 2 + max((len(tokenizer(" " + item.answer)["input_ids"]) for item in items), default=0)
    # transformers 5.24 renamed the argument, not the output's field.
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    for group in by_length.values():
        for at in range(0, len(group), batch):
            chosen = group[at:at + batch]
            ids, cache, said = torch.tensor([prompts[i] for i in chosen], device=device), None, []
            for _ in range(new):
                out = model(input_ids=ids, use_cache=True, **{name: cache})
                cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                said.append(ids)
            for i, row in zip(chosen, torch.cat(said, dim=1).tolist(), strict=True):
                row = row[:row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
                scores[i] = float(items[i].score(tokenizer.decode(row).split("\n")[0].strip()))
    return scores


@torch.no_grad()
def answer_loss(model: nn.Module, tokenizer, items: Sequence[Item], batch: int = 32) -> float:
    """Mean negative log-likelihood of an answer's token, nats."""
    model.eval()
    total = count = 0.0
    device = next(model.parameters()).device
    for at in range(0, len(items), batch):
        inputs = {k: v.to(device) for k, v in collate(tokenizer, items[at:at + batch]).items()}
        n = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total += model(**inputs).loss.item() * n
        count += n
    return total / max(count, 1)


def forgetting(model: nn.Module, tokenizer, windows: int) -> dict[str, float]:
    """Perplexity on English and on Python that no task trains on."""
    return {"english_ppl": text.perplexity(model, tokenizer, text.english(), windows=windows),
            "code_ppl": text.perplexity(model, tokenizer, text.code(), windows=windows)}
