"""The demonstration's task: short sums, with exact answers and splits that share no problem.

The task is reasoning-gym's chain_sum with one-digit numbers and two or three terms; every
problem there is, is listed once, so a held-out problem was never trained on.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

PROMPT = "State the final answer to the following arithmetic problem: {} ="
IGNORED = -100  # the label that cross-entropy leaves out


@dataclass(frozen=True)
class Problem:
    expression: str
    answer: str

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.expression)


def all_problems(terms: Sequence[int] = (2, 3)) -> list[Problem]:
    """Every sum of one-digit numbers with these numbers of terms, once: 200 + 4,000."""
    problems = []
    for n in terms:
        for first, *others in itertools.product(range(10), repeat=n):
            for signs in itertools.product((1, -1), repeat=n - 1):
                tail = "".join(f" {'+' if s > 0 else '-'} {x}" for s, x in zip(signs, others, strict=True))
                total = first + sum(s * x for s, x in zip(signs, others, strict=True))
                problems.append(Problem(f"{first}{tail}", str(total)))
    return problems


def split(n_train: int, n_test: int, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Disjoint training and test problems, half of them of each length where there are enough."""
    rng = random.Random(seed)
    two, three = all_problems((2,)), all_problems((3,))
    rng.shuffle(two)
    rng.shuffle(three)
    n_two = min(n_test // 2, 60)
    test = two[:n_two] + three[:n_test - n_two]
    train = two[n_two:][:n_train // 2]
    train += three[n_test - n_two:][:n_train - len(train)]
    rng.shuffle(train)
    return train, test


def collate(tokenizer, items: Sequence[Any]) -> dict[str, Tensor]:
    """A padded batch for a causal LM; only the answer and the end of text bear a loss.

    Args:
        items: with a `prompt`, which may be empty, and an `answer`, such as `Problem`.

    Returns:
        input_ids, attention_mask, labels: int64 [batch, tokens].
    """
    ids, labels = [], []
    for item in items:
        prompt = tokenizer(item.prompt)["input_ids"] if item.prompt else []
        lead = " " if item.prompt else ""
        answer = tokenizer(lead + item.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids.append(torch.tensor(prompt + answer, device="cpu"))
        labels.append(torch.tensor([IGNORED] * len(prompt) + answer, device="cpu"))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


@torch.no_grad()
def greedy_answers(model: nn.Module, tokenizer, prompts: Sequence[str], new_tokens: int, batch: int = 32) -> list[str]:
    """The greedy answer to every prompt, in order: what stands before the first end of text or of line, stripped."""
    device = next(model.parameters()).device
    # transformers 5.24 renamed both the argument and the output's field.
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    name = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"
    model.eval()
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(index)  # equal lengths need no padding
    said = [""] * len(prompts)
    for group in by_length.values():
        for at in range(0, len(group), batch):
            chosen = group[at:at + batch]
            ids, cache, answer = torch.tensor([tokens[i] for i in chosen], device=device), None, []
            for _ in range(new_tokens):
                out = model(input_ids=ids, use_cache=True, **{name: cache})
                cache, ids = getattr(out, name), out.logits[:, -1:].argmax(-1)
                answer.append(ids)
            for i, row in zip(chosen, torch.cat(answer, dim=1).tolist(), strict=True):
                if tokenizer.eos_token_id in row:
                    row = row[:row.index(tokenizer.eos_token_id)]
                said[i] = tokenizer.decode(row).split("\n")[0].strip()
    return said


def exact_match(model: nn.Module, tokenizer, problems: Sequence[Problem], batch: int = 32,
                new_tokens: int = 5) -> float:
    """Share of the problems that greedy decoding answers exactly, 0 to 1."""
    said = greedy_answers(model, tokenizer, [problem.prompt for problem in problems], new_tokens, batch)
    right = sum(answer == problem.answer for answer, problem in zip(said, problems, strict=True))
    return right / max(len(problems), 1)
