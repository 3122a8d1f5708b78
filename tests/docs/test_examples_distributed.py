"""The examples for many devices run as they stand, on two ranks of the CPU."""

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import alps_kernels as alps
from alps_kernels.demo.run import tiny_model
from tests.support import ranks as worlds

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks, name, *arguments):
    """What the script prints."""
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         str(ROOT / "examples" / name), "--tiny", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def as_a_rank(name, port, arguments, rank, world, folder):
    """A script run by ranks that are there already: torchrun starts Python anew, which takes its time."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [name, "--tiny", *map(str, arguments)]
    with open(folder / f"said.{rank}", "w") as said, contextlib.redirect_stdout(said):
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return []


def in_a_world(ranks, name, folder, *arguments):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert worlds.run(ranks, {"run": partial(as_a_rank, name, port, arguments)}, folder)["run"] == []
    return (folder / "said.0").read_text()


def trained(folder):
    """The saved weights, once it is seen that of the model's bytes the heads' alone have moved."""
    torch.manual_seed(0)
    before, _ = tiny_model()
    after = AutoModelForCausalLM.from_pretrained(folder)
    heads = alps.HeadSelection.random(alps.find_heads(before), 0.10)
    parts = {part.name: part for part in heads.bind(before).params}
    weights = after.state_dict()
    for name, then in before.named_parameters():
        frozen = torch.ones_like(then, dtype=torch.bool)
        for block in parts[name].blocks(frozen) if name in parts else ():
            block.fill_(False)
        assert torch.equal(weights[name][frozen], then[frozen]), name
        assert frozen.all() or not torch.equal(weights[name][~frozen], then[~frozen]), name
    return weights


def test_ddp(tmp_path):
    said = torchrun(2, "ddp.py", "--output", tmp_path, "--steps", 3)
    assert re.search(r"step 2: loss \d+\.\d{4}\n", said) and "of q/k/v" in said
    trained(tmp_path)


def test_fsdp2_goes_on_where_it_stopped(tmp_path):
    whole = in_a_world(2, "fsdp2.py", tmp_path / "a", "--output", tmp_path / "whole", "--steps", 3)
    in_a_world(2, "fsdp2.py", tmp_path / "b", "--output", tmp_path / "parts", "--steps", 2)
    rest = torchrun(2, "fsdp2.py", "--output", tmp_path / "parts", "--steps", 3, "--resume")
    assert rest in whole and "step 2: loss" in rest
    one, other = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
