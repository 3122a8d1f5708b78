"""Two gloo ranks under DDP: the same model on both, the frozen bytes whole, the switch and the resume included."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import alps_kernels as alps

from .cases import assert_only_moved, assert_same, model, trainer

ROOT = Path(__file__).resolve().parents[2]


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "tests.integrations.trainer_ranks", str(folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=280, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def test_two_ranks(tmp_path):
    launch(tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert_same(*ranks)
    assert_same(ranks[0]["whole"], ranks[0]["resumed"])
    state, heads = ranks[0]["two runs"]
    tuned = model()
    tuned.load_state_dict(state)
    assert_only_moved(tuned, model(), alps.HeadSelection(heads, [4, 4]).bind(tuned))
    first = ranks[0]["whole"]
    for name in ("heads", "one run"):
        trained = model()
        trained.load_state_dict(first[name]["model"])
        heads = alps.HeadSelection(first[name]["heads"], [4, 4])
        assert len(heads) == {"heads": 2, "one run": 1}[name] and heads.bind(trained).numel == first[name]["numel"]
        assert_only_moved(trained, model(), heads.bind(trained))

    alone = model()  # one process with the batch of both
    made = trainer(alone, tmp_path / "alone", save_strategy="no", max_steps=5)
    alps.use_heads(made, alps.HeadSelection(first["heads"]["heads"], [4, 4]))
    made.train()
    for name, value in alone.state_dict().items():
        assert torch.allclose(value, first["heads"]["model"][name], atol=1e-4), name  # weights move by up to 3e-2
    assert [row["loss"] for row in made.state.log_history if "loss" in row] == pytest.approx(
        first["heads"]["losses"], abs=1e-4)
