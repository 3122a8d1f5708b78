"""The example for one device runs as it stands and trains what it says."""

import re
import runpy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import alps_kernels as alps
from alps_kernels.demo.run import tiny_model

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "single_device.py"


def test_single_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--tiny", "--steps", "12", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    torch.manual_seed(0)
    start = tiny_model()[0]
    heads = alps.HeadSelection.random(alps.find_heads(start), 0.10)
    bound = heads.bind(start)
    grads, state = (int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes", said))
    assert grads == 4 * bound.numel and 8 * bound.numel <= state < 8 * bound.numel + 64 * len(bound.params)
    end = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    parts = {part.name: part for part in bound.params}
    for name, param in start.named_parameters():
        moved = end[name].detach() != param.detach()
        assert moved.sum() <= (parts[name].numel if name in parts else 0), name
        assert name not in parts or parts[name].cut(moved).float().mean() > 0.9
