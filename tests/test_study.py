"""The study's machinery: cells resume, a rerun is bit-equal, intervals and claims follow the rows."""

import csv

import numpy as np
import pytest

pytest.importorskip("peft")
from bench.study import __main__ as study  # noqa: E402
from bench.study import cells, report, tasks  # noqa: E402


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
    plan, rates = cells.load("tiny")
    rate = study.chosen_rates("tiny", plan, rates, rows)["chain_sum", "full"]
    losses = {float(r["lr"]): float(r["dev_loss"]) for r in rows.values() if r["seed"] == "100"}
    assert rate == min(losses, key=losses.get) and len(losses) == 3
    key = next(k for k in rows if k.endswith("/0") and "/full/" in k)
    assert study.main(["rerun", key, "--profile", "tiny"]) == 0 and "equal" in capsys.readouterr().out
    lines = list(csv.reader(table.open()))
    place = lines[0].index("train_loss_bits")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([[c if i != place or row[0] != key else "0x1p+0" for i, c in enumerate(row)] for row in lines])
    assert study.main(["rerun", key, "--profile", "tiny"]) == 1


@pytest.mark.slow
def test_every_method_runs(table, tmp_path):
    study.run("tiny", [], limit=None, seconds=None)
    rows = study.read(table)
    assert {row["method"] for row in rows.values()} >= {"base", *cells.load("tiny")[0]["methods"]}
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


def test_intervals_and_verdicts():
    rng = np.random.default_rng(1)
    low, high = ({s: (rng.random(200) < p).astype(float) for s in range(3)} for p in (0.2, 0.6))
    better = report.interval(high, low)
    assert better[1] > 0.2 and better[1] < better[0] < better[2] and report._verdict(better, 1, 3) == "yes"
    assert report._verdict(report.interval(low, high), 1, 3) == "no" and report._verdict(better, -1, 3) == "no"
    same = report.interval(low, {s: v[::-1].copy() for s, v in low.items()})
    assert same[1] < 0 < same[2] and report._verdict(same, 1, 3) == "undecided"
    assert np.isnan(report.interval({}, low)[0])
    assert report._verdict(better, 1, 2) == "too few seeds"
    losses = {0: np.array([1.0]), 1: np.array([1.2]), 2: np.array([1.1])}
    mean, below, above = report.interval(losses)  # t of 2 degrees of freedom: 4.3027 * 0.1 / sqrt(3)
    assert mean == pytest.approx(1.1) and above - mean == pytest.approx(0.24841, rel=1e-4) and mean - below == pytest.approx(above - mean)
    assert report.interval({0: np.array([1.0])})[1:] == (-np.inf, np.inf)


def test_an_unknown_profile_is_named():
    with pytest.raises(ValueError, match="no profile is called 'lr'"):
        cells.load("lr")
