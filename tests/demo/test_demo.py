"""The demonstration's task, its splits and its checks of itself."""

import torch
from torch import nn

from alps_kernels.demo import chain_sum, run, text
from alps_kernels.selection import BoundParam, BoundSelection
from alps_kernels.selection.binding import SelectionCount


def test_every_problem_is_right_and_listed_once():
    problems = chain_sum.all_problems()
    assert len(problems) == len({p.expression for p in problems}) == 4200
    assert all(eval(p.expression) == int(p.answer) for p in problems)  # noqa: S307, our own arithmetic


def test_splits_share_no_problem():
    train, test = chain_sum.split(4000, 128, seed=3)
    assert len(test) == 128 and len(set(train)) == len(train) and not set(train) & set(test)
    assert chain_sum.split(4000, 128, seed=3) == (train, test) != chain_sum.split(4000, 128, seed=4)


def test_only_answers_bear_a_loss():
    _, tokenizer = run.tiny_model()
    problems = chain_sum.split(4, 4)[0]
    batch = chain_sum.collate(tokenizer, problems)
    for row, labels, problem in zip(batch["input_ids"], batch["labels"], problems, strict=True):
        spoken = labels[labels != chain_sum.IGNORED]
        assert tokenizer.decode(spoken) == f" {problem.answer}</s>"
        assert torch.equal(row[labels != chain_sum.IGNORED], spoken)


class Oracle(nn.Module):
    """Answers every problem rightly but those it is told to miss, one byte at a time."""

    def __init__(self, tokenizer, missed):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.tokenizer, self.missed = tokenizer, missed

    def forward(self, input_ids, past_key_values=None, use_cache=False):
        history = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for i, ids in enumerate(history.tolist()):
            question, _, spoken = self.tokenizer.decode(ids).partition("=")
            expression = question.split(":")[-1].strip()
            answer = self.tokenizer(f" {eval(expression)}" + ("?" if expression in self.missed else ""))["input_ids"]  # noqa: S307
            answer += [self.tokenizer.eos_token_id] * 9
            logits[i, -1, answer[len(self.tokenizer(spoken)["input_ids"]) if spoken else 0]] = 1
        return type("Output", (), {"logits": logits, "past_key_values": history})


def test_exact_match_counts_exact_matches():
    _, tokenizer = run.tiny_model()
    problems = chain_sum.split(4, 10)[1]
    assert chain_sum.exact_match(Oracle(tokenizer, ()), tokenizer, problems) == 1.0
    missed = [p.expression for p in problems[:3]]
    assert chain_sum.exact_match(Oracle(tokenizer, missed), tokenizer, problems) == 0.7


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    model, tokenizer = run.tiny_model()
    nn.init.zeros_(model.lm_head.weight)
    assert abs(text.perplexity(model, tokenizer, text.english(), windows=1) - len(tokenizer)) < 0.1


def test_text_is_on_every_machine():
    assert len(text.english()) > 2000 and len(text.code()) > 20_000


def test_changed_bytes_are_told_apart():
    model = nn.Linear(4, 4, bias=False)
    before = {"weight": model.weight.detach().clone()}
    bound = BoundSelection(None, (BoundParam("weight", model.weight, 0, ((0, 2),)),), "frozen", SelectionCount({}, {}))
    assert run.changed_bytes(model, before, bound) == (0, 0)
    with torch.no_grad():
        model.weight[1, 0] = -model.weight[1, 0]  # the sign: one byte
    assert run.changed_bytes(model, before, bound) == (1, 0)
    with torch.no_grad():
        model.weight[3, 3] = -model.weight[3, 3]
    assert run.changed_bytes(model, before, bound) == (1, 1)
