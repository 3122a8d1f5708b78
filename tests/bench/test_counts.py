"""What a training step costs, counted: the counters themselves, and that sliced heads cost what they promise."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from alps_kernels import HeadAdamW
from bench import bench_counts, common, report, workloads
from bench.bench_counts import check, counted
from bench.counting import Saved, Watch, count_step, state_bytes
from bench.finetune_methods import FINETUNE_METHODS, LORA, SLICED
from tests.slicing.cases import loss_of, pair


def test_products_over_the_tokens_are_weight_gradients_and_no_others():
    layer, x = nn.Linear(64, 32), torch.randn(48, 64, requires_grad=True)
    with Watch(48) as watch:
        y = layer(x)
    assert watch.work.flops == 2 * 48 * 64 * 32 and watch.work.weight_flops == 0
    with Watch(48) as watch:
        y.sum().backward()
    assert watch.work.flops == 2 * 2 * 48 * 64 * 32 and watch.work.weight_flops == 2 * 48 * 64 * 32


def test_an_operation_that_copies_is_seen_and_a_view_is_not():
    x = torch.randn(6, 4)
    with Watch(1) as watch:
        x.t().reshape(4, 6).narrow(0, 0, 2)
    assert not watch.work.ops and not watch.work.written
    with Watch(1) as watch:
        x.t().contiguous()
    assert sum(watch.work.ops.values()) == 1 and watch.work.written == 96


def test_a_storage_is_saved_once_and_parameters_are_not():
    weight, x = nn.Parameter(torch.randn(8, 8)), torch.randn(4, 8)
    saved = Saved([weight])
    with saved.hooks():
        (x @ weight).sum() + (x[:2] @ weight).sum()  # x as a whole and a view of it
    assert saved.bytes == x.numel() * 4
    sparse = Saved([])
    with sparse.hooks():  # SHiRA's deltas: indices and values
        torch.sparse.mm(torch.eye(4).to_sparse(), nn.Parameter(torch.randn(4, 8)))
    assert sparse.bytes == 4 * 2 * 8 + 4 * 4


def test_a_step_is_counted_whole():
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[2].parameters())
    x = torch.randn(12, 16)
    step = count_step(model, lambda: model(x).sum(), optimizer, 12, 32)
    assert (step.trained, step.grads, step.state) == (32, 32 * 4, 2 * 32 * 4 + 4)
    assert step.saved == 12 * 8 * 4  # the input of the second layer: nothing below it needs a gradient
    assert step.backward.weight_flops == step.backward.flops == 2 * 12 * 8 * 4
    assert state_bytes(optimizer) == step.state


def test_a_weight_that_has_to_follow_its_leaf_is_seen_in_the_forward_pass():
    plain, _, sliced, bound = pair("llama", parts=("q", "k", "v"))
    with Watch(14) as frozen:
        loss_of(plain.requires_grad_(False))
    optimizer = HeadAdamW(sliced.parameters(), heads=bound)
    loss_of(sliced).backward()
    optimizer.step()
    with Watch(14) as trained:
        loss_of(sliced)
    assert trained.work == frozen.work
    with torch.no_grad():
        bound.params[0].param.add_(1)
    with Watch(14) as behind:
        loss_of(sliced)
    assert behind.work.written > frozen.work.written and behind.work.flops == frozen.work.flops


@pytest.fixture(scope="module")
def llama():
    workload = workloads.llama8b(3, length=768)
    return (workload, *counted(workload, (0.01, 0.10, 1.0)))


def test_sliced_heads_of_8b_layers_cost_what_they_promise(llama):
    workload, rows, steps = llama
    check(workload, steps)
    assert {row["method"] for row in rows} == set(FINETUNE_METHODS)
    assert [row["method"] for row in rows if "not run" in row.get("note", "")] == ["SHiRA"]
    ours, lora, mask = steps[SLICED, 0.10], steps[LORA, 0.10], steps["gradient mask, AdamW", 0.10]
    assert ours.grads < mask.grads / 4 and ours.saved <= lora.saved
    assert ours.backward.weight_flops < mask.backward.weight_flops / 4


def test_sliced_heads_of_smollm2_cost_what_they_promise():
    workload = workloads.smollm2(2, length=40)
    rows, steps = counted(workload, (0.10,))
    check(workload, steps)
    assert not [row for row in rows if "note" in row]
    assert steps["SHiRA", 0.10].forward.written > steps[SLICED, 0.10].forward.written  # it copies W


BROKEN = {
    "gradients": lambda step: replace(step, grads=step.grads + 2),
    "state": lambda step: replace(step, state=2 * step.state),
    "weight-gradient": lambda step: replace(step, backward=replace(step.backward, weight_flops=step.backward.weight_flops + 2)),
    "forward": lambda step: replace(step, forward=replace(step.forward, written=step.forward.written + 2)),
    "saved": lambda step: replace(step, saved=2 * step.saved),
}


@pytest.mark.parametrize("promise", BROKEN)
def test_a_broken_promise_stops_the_bench(llama, promise):
    workload, _, steps = llama
    with pytest.raises(SystemExit, match=f"parity of {promise}"):
        check(workload, {**steps, (SLICED, 0.10): BROKEN[promise](steps[SLICED, 0.10])})


def test_the_report_shows_the_counts(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    _, rows, steps = llama
    rows = [{**row, "case": row["case"].replace("of 32", "of 3")} for row in rows]  # only whole models are shown
    path = common.write_rows("counts", rows, bench_counts.COLUMNS)
    with path.open(newline="") as file:
        assert tuple(next(csv.reader(file))) == bench_counts.COLUMNS
    report.main()
    page = (tmp_path / "results.md").read_text()
    line = next(x for x in page.splitlines() if x.startswith(f"| {SLICED} |"))
    assert f" {steps[SLICED, 0.10].saved / 2**20:,.1f} " in line and f" {steps[SLICED, 0.10].grads / 2**20:,.1f} " in line
    assert "| SHiRA | not run: PEFT" in page
