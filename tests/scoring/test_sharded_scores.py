"""Scores computed by 2 and 4 ranks are those of one process, to the bit; 4 ranks share 3 layers."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

import alps_kernels as alps
from alps_kernels.cli.commands import app
from alps_kernels.scoring import score as scoring
from alps_kernels.tensors import ranks as distributed
from alps_kernels.weights import Checkpoint
from tests.support import ranks

from ..support.mutants import check_plantable, plant
from ..support.sharded_cases import model_of

METRICS = ("pad", "js", "relative")


def pair():
    base = model_of("llama").double()
    task = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in task.parameters():
            param.add_(1e-3 * torch.randn(param.shape, generator=generator, dtype=param.dtype))
    task.model.layers[1].self_attn.float()  # one layer of another dtype, for the provenance
    return base, task


def equal(folder, world, sources):
    """Of every rank against this very process alone; each reads its own layers only."""
    read, original, problems = set(), Checkpoint.read, []

    def watched(self, params):
        params = list(params)
        read.update(params)
        return original(self, params)

    alone = alps.score_heads(*sources, metric=METRICS, representation="qkv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", watched)
        many = alps.score_heads(*sources, metric=METRICS, representation="qkv", distributed=True)
    for name in METRICS:
        mine, other = many[name], alone[name]
        if not (torch.equal(mine.tensor, other.tensor) and mine.heads == other.heads and len(set(other.tensor.tolist())) > 9):
            problems.append(f"{name}: {mine.tensor.tolist()}, alone {other.tensor.tolist()}")
        if mine.provenance["models"] != other.provenance["models"]:
            problems.append(f"provenance {mine.provenance}")
    every = [None] * world
    dist.all_gather_object(every, read)
    if not isinstance(sources[0], torch.nn.Module):
        layers = [{name.split(".")[2] for name in names} for names in every]
        expected = [{str(i) for i in range(3) if i % world == r} for r in range(world)]
        problems += [] if layers == expected else [f"layers read: {layers}"]
    return problems


def models(rank, world, folder):
    return equal(folder, world, pair())


def checkpoints(rank, world, folder):
    return equal(folder, world, (folder / "base", folder / "task"))


def error(rank, world, folder):
    """A weight that one rank reads and finds infinite stops all of them, in the same words."""
    base, task = pair()
    with torch.no_grad():
        task.model.layers[2].self_attn.k_proj.weight[1, 1] = float("inf")
    try:
        alps.score_heads(base, task, distributed=True)
    except ValueError as found:
        return [] if "model.layers.2.self_attn.k_proj.weight of the task model" in str(found) else [str(found)]
    return ["no error"]


def identical(rank, world, folder):
    base, _ = pair()
    with pytest.warns(UserWarning, match="every score is zero"):
        scores = alps.score_heads(base, copy.deepcopy(base), distributed=True)
    return [] if not scores.tensor.any() and len(scores) == 12 else [str(scores.tensor)]


def one_layer_moved(rank, world, folder):
    """Models that differ in one rank's layers alone are not identical."""
    base, _ = pair()
    task = copy.deepcopy(base)
    with torch.no_grad():
        task.model.layers[1].self_attn.q_proj.weight += 0.01 * torch.arange(24.0)
    scores = alps.score_heads(base, task, distributed=True)
    moved = (scores.tensor != 0).tolist()
    return [] if moved == [False] * 4 + [True] * 4 + [False] * 4 else [str(scores.tensor)]


CHECKS = {"models": models, "checkpoints": checkpoints, "error": error, "identical": identical,
          "one_layer_moved": one_layer_moved}
FAULTS = {
    "layers in the order of ranks": (scoring, "parts[i % n].found[name][i // n]", "parts[min(i // 2, n - 1)].found[name][i % 2]", "models"),
    "every rank reads all": (scoring, "plan = plan[share]", "plan = plan", "checkpoints"),
    "identical on one rank is identical": (scoring, "all(part.identical", "any(part.identical", "one_layer_moved"),
    "the error stays on its rank": (distributed, "        if error is not None:\n", "        if False:\n", "error"),
}


def faulty(name, rank, world, folder):
    module, old, new, check = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, module, (old, new))
        return CHECKS[check](rank, world, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("base", "task"), pair(), strict=True):
        model.float().save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {world: ranks.run(world, CHECKS, folder) for world in (2, 4)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", CHECKS)
def test_many_ranks_score_as_one(found, world, check):
    assert found[world][check] == []


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, folder):
    module, old, new, _ = FAULTS[name]
    check_plantable(module, (old, new))
    assert ranks.run(2, {"faulty": partial(faulty, name)}, folder, patience=10)["faulty"]


def test_without_ranks_it_says_what_to_do():
    with pytest.raises(ValueError, match="init_process_group"):
        alps.score_heads(*pair(), distributed=True)


def test_torchrun_writes_and_prints_once(folder, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(alps.__file__).parent.parent)}
    arguments = ["score", str(folder / "base"), str(folder / "task"), "--top", "0.25", "-o"]
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          "-m", "alps_kernels", *arguments, str(tmp_path / "two.json")],
                         env=environment, capture_output=True, text=True, timeout=250)
    assert two.returncode == 0, two.stderr
    assert two.stdout == CliRunner().invoke(app, [*arguments, str(tmp_path / "one.json")]).stdout
    documents = [json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json")]
    for document in documents:
        document["provenance"].pop("date")
    assert documents[0] == documents[1]
