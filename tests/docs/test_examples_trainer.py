"""The examples of the Trainers run as they stand, and go on where they were stopped."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def run(name, monkeypatch, capsys, *arguments):
    """What the script says in the end: the heads and the share of sums."""
    monkeypatch.setattr("sys.argv", [name, "--tiny", *map(str, arguments)])
    capsys.readouterr()
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    said = capsys.readouterr().out
    return said[said.rindex("4 of 32 heads (12.5%)"):]


def test_trainer(tmp_path, monkeypatch, capsys):
    arguments = ("--output", tmp_path, "--warmup", 2)
    first = run("trainer.py", monkeypatch, capsys, *arguments, "--steps", 6)
    assert "% of 32 held-out sums" in first
    again = run("trainer.py", monkeypatch, capsys, *arguments, "--steps", 6, "--resume")
    assert again == first


def test_sft(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    first = run("sft.py", monkeypatch, capsys, "--output", tmp_path, "--steps", 4)
    assert "% of 32 held-out sums" in first
    monkeypatch.setattr("transformers.Trainer.train", None)  # nothing is left to train
    assert run("sft.py", monkeypatch, capsys, "--output", tmp_path, "--steps", 4) == first
