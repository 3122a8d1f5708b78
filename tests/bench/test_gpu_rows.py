"""Rows of the benchmarks on a card that is not there: a failing rival, kernels alone, rows written as they come."""

import csv
import os
import subprocess
import sys

import pytest
import torch

from bench import (
    attention, baselines, bench_adamw, bench_grad_norm, bench_host, bench_score, common, gpu, kernels, timing,
)
from bench.shapes import Shape
from tests.bench.fake_card import FakeCard

TINY = Shape("tiny", 2, 96, 6, 2, 16)


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("card", [True, False], ids=["fake card", "CPU"])
@pytest.mark.parametrize("when", ["built", "called"])
def test_a_failing_rival_loses_its_row_and_not_the_case(card, when, monkeypatch):
    if card:
        FakeCard(monkeypatch)

    def fails():
        raise TypeError("optimizer() got an unexpected argument\nand more")

    def failing():
        if when == "built":
            fails()
        return timing.Timed(fails)

    builders = {"ours": lambda: timing.Timed(lambda: None), "gone": failing, "last": lambda: timing.Timed(lambda: None)}
    rows = {row["rival"]: row for row in timing.timed_rows("case", builders, 3)}
    assert rows["gone"]["note"] == "not run: TypeError: optimizer() got an unexpected argument"
    assert "median_ms" not in rows["gone"] and rows["ours"]["ratio"] == 1 and rows["last"]["median_ms"] >= 0


def test_rows_of_a_card_are_on_disk_before_the_next_one_is_measured(tmp_path, monkeypatch):
    FakeCard(monkeypatch)
    monkeypatch.setenv("OUT", str(tmp_path))
    seen = []

    def late():
        seen.append([row["rival"] for row in rows_in(tmp_path / "some.csv")])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builders = {"first": lambda: timing.Timed(lambda: None), "late": late}
        common.write_each("some", timing.timed_rows("case", builders, 3))
    assert seen == [["first"]]


def test_a_profiler_that_does_not_run_costs_no_time(monkeypatch, capsys):
    FakeCard(monkeypatch)

    def fails(call):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(timing, "launches", fails)
    row = timing.time_each({"a": lambda: timing.Timed(lambda: None)}, 3)["a"]
    assert "median_ms" in row and "launches" not in row and "no CUPTI" in capsys.readouterr().out


def test_gpu_time_is_that_of_a_graph_of_many_calls(monkeypatch):
    card, calls = FakeCard(monkeypatch, ms=2.0), []
    took = kernels.gpu_time(lambda: calls.append(1), repeats=3)
    assert took == dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 2.0 / 10)  # 20 ms hold ten calls of 2 ms
    assert len(calls) == 1 + 3 + 10  # an estimate, a warm-up, a capture; none of them between the events of a replay
    assert card.done == ["event", "event", "capture", "replay", *["event", "replay", "event"] * 3]


def test_a_call_that_cannot_be_captured_loses_its_row(monkeypatch):
    FakeCard(monkeypatch).fails = RuntimeError("operation not permitted when stream is capturing")
    row = timing.time_each({"a": lambda: timing.Timed(lambda: None, clock=kernels.gpu_time)}, 3)["a"]
    assert row == {"note": "not run: RuntimeError: operation not permitted when stream is capturing"}


def one_case(monkeypatch, ratio=0.5):
    monkeypatch.setitem(baselines.BASELINES, "gone", ("no-such-package", lambda params: __import__("no_such_package")))
    few = {name: baselines.BASELINES[name] for name in ("torch AdamW fused", "gone")}
    monkeypatch.setattr(bench_adamw, "BASELINES", few)
    return attention.Selected.of(TINY, 2, ratio, False, torch.float32)


def test_the_step_s_rows_on_a_card_come_in_the_order_of_want(monkeypatch):
    FakeCard(monkeypatch)
    monkeypatch.setattr(bench_adamw, "alone", lambda call, facts, _=None: timing.Timed(call, facts, kernels.gpu_time))
    rows = list(bench_adamw.run(one_case(monkeypatch), 10.0, 2))
    assert [row["rival"] for row in rows][:10] == [
        "HeadAdamW", "HeadAdamW, kernels alone", "copy, dense", "HeadAdamW, dense, kernels alone",
        "torch AdamW fused, dense, kernels alone", "torch AdamW fused + mask, kernels alone",
        "HeadAdamW, captured graph", "HeadAdamW, TILES=1, kernels alone", "HeadAdamW, TILES=2, kernels alone",
        "torch AdamW fused + mask"]
    by_name = {row["rival"]: row for row in rows}
    # torch's capturable path is of accelerators alone: on the CPU it fails, and costs its rows
    lost = {name for name, row in by_name.items() if "median_ms" not in row}
    assert lost <= {"torch AdamW fused, dense, kernels alone", "torch AdamW fused + mask, kernels alone",
                    "HeadAdamW, captured graph", "gone, dense"}, [by_name[name] for name in lost]
    assert by_name["gone, dense"]["note"] == "not run: no-such-package is not installed"
    ours = by_name["HeadAdamW, kernels alone"]
    assert ours["share"] == pytest.approx(ours["bytes"] / ours["median_ms"] / 1e6 / 10.0) and ours["ratio"] > 0


def test_without_triton_launches_the_kernel_rows_say_so(monkeypatch):
    FakeCard(monkeypatch)  # its tensors are the CPU's, and so the step is plain PyTorch
    rows = {row["rival"]: row for row in bench_adamw.run(one_case(monkeypatch), 10.0, 2)}
    assert rows["HeadAdamW, kernels alone"]["note"] == "not run: the call launched no Triton kernel"
    assert "median_ms" in rows["HeadAdamW"]


def test_the_norm_and_scoring_have_kernel_rows_on_a_card(monkeypatch):
    FakeCard(monkeypatch)
    rows = list(bench_grad_norm.run(attention.Selected.of(TINY, 2, 0.5, False, torch.float32), 10.0, 2))
    assert [row["rival"] for row in rows][:2] == ["head_grad_norm", "head_grad_norm, kernels alone"]
    rivals = [row["rival"] for row in bench_score.run(TINY, 1, 1)]
    ops = [f"alps_kernels {name}{end}" for name in ("pad projection", "pad qkv", "all metrics qkv")
           for end in ("", ", kernels alone")]
    assert rivals == [*ops, "score_heads, defaults", "score_heads, qkv", "score_heads, qkv, all metrics",
                      "released algorithm (scipy, CPU)"]


def test_the_public_scores_of_the_pair_are_those_of_its_function():
    base, task = bench_score.models(TINY, 2, "cpu", torch.float32)
    scores = bench_score.score_heads(base, task)
    assert len(scores) == 12 and scores.tensor.min() > 0
    rows = {row["rival"]: row for row in bench_score.run(TINY, 2, 1)}
    size = 2 * 2 * 4 * 96 * 16 * (6 + 2 + 2)  # models, layers, bytes, q/k/v of a layer
    assert rows["score_heads, defaults"]["bytes"] == rows["score_heads, qkv"]["bytes"] == size
    assert rows["score_heads, defaults"]["median_ms"] > 0 and "released / this" in rows["score_heads, qkv"]["note"]


def test_a_case_without_a_time_of_ours_fails_the_bench(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(attention, "copy_bandwidth", lambda: 10.0)
    argv = ["--layers", "1", "--ratio", "1.0", "--shape", "SmolLM2-135M"]
    rows = [{"case": "c", "rival": "ours", "note": "not run: out of memory"},
            {"case": "c", "rival": "x", "median_ms": 1.0}]
    with pytest.raises(SystemExit, match="ours not run: out of memory"):
        attention.sweep("doc", "some", lambda *_: iter(rows), argv)
    assert [row["rival"] for row in rows_in(tmp_path / "some.csv")] == ["ours", "x"]
    attention.sweep("doc", "some", lambda *_: iter(rows[1:]), argv)


def test_the_host_bench_moves_gradients_and_refers_to_reading_them():
    tensors = bench_host.Tensors(4)
    before = tensors.read()[1]
    tensors.move()
    assert not set(before) & set(tensors.read()[1])
    tensors.move()
    assert before == tensors.read()[1]
    rows = list(bench_host.run(4, 3))
    assert [row["rival"] for row in rows][:3] == [bench_host.READ, "HeadAdamW", "HeadAdamW, gradients moved"]
    assert rows[0]["ratio"] == 1 and all(row["ratio"] > 0 for row in rows)


RECORDED = """
import gc, torch
from alps_kernels.optim import HeadAdamW
from bench import bench_adamw
from bench.attention import attention, bound_to
from bench.shapes import Shape

HeadAdamW._backend = "triton"
shape = Shape("tiny", 1, 64, 4, 2, 16)
params = attention(shape, 1, torch.float32)
bound = bound_to(shape, params, [(0, 1)])
timed = bench_adamw.kernels_of(bench_adamw.ours, params, bound)
before = {name: p.detach().clone() for name, p in params.items()}
timed.call()  # the recorded launch once more: it moves the same elements
moved = {name: int((before[name] != p).sum()) for name, p in params.items()}
assert moved == {f"0.{part}": 16 * 64 for part in "qkvo"}, moved
ends = []
for tiles in bench_adamw.TILES:
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])
    call = bench_adamw.retiled(tiles, params, bound).call
    gc.collect()
    call()  # what the tables point to is alive
    ends.append({name: p.detach().clone() for name, p in params.items()})
    moved = {name: int((before[name] != p).sum()) for name, p in params.items()}
    assert moved == {f"0.{part}": 16 * 64 for part in "qkvo"}, (tiles, moved)
assert all(torch.equal(ends[0][name], ends[1][name]) for name in params)
"""


def test_a_launch_is_changed_to_other_tiles_a_program():
    launch = kernels.Launch(None, None, None, (), {"grid": (7, 1, 1), "TILES": 2, "GROUPS": 128})
    one, four = (kernels.with_tiles(n)(launch) for n in (1, 4))
    assert one.options == {"grid": (14, 1, 1), "TILES": 1, "GROUPS": 128} and four.options["grid"] == (4, 1, 1)


SCORED = """
import gc, torch
from functools import partial
from alps_kernels.ops import head_delta, head_delta_projection
from alps_kernels.ops.delta import projection, tables
from bench import bench_score
from bench.kernels import launches_of
from bench.shapes import Shape
from bench.timing import Timed

tables.SCANS = 2
shape = Shape("tiny", 1, 128, 2, 1, 32)
given = [bench_score.layer_of(shape, "cpu", torch.float32, 0)]
for score, names in ((head_delta, ["head_delta_stats_kernel", "list_tiles_kernel", "head_delta_scan_kernel"]),
                     (head_delta_projection,
                      ["group_products_kernel", "projection_stats_kernel", "list_tiles_kernel",
                       "projection_scan_kernel"])):
    found = launches_of(partial(score, given, ["pad"], backend="triton"))
    assert [launch.kernel.__name__ for launch in found] == names, found
    sums = found[-2].args[-2]
    first = sums.sum(0)
    for column in ("steps", "listed"):
        assert first[:, tables.SumRow._fields.index(column)].min() > 0, column
    sums.zero_()
    gc.collect()
    for launch in found:
        launch()  # with what the first call read and wrote
    assert torch.equal(first, sums.sum(0)), (score, first, sums.sum(0))

seen = []
def noting(call):
    *_, stats, _, scan = launches_of(call)
    sizes = [stats.options.get(name) for name in ("TILE", "RUNS", "K_BLOCK", "num_warps")]
    seen.append((*sizes, stats.options["grid"][0], scan.options["grid"][1]))
    return Timed(lambda: None)

def rows_of_tiles():
    seen.clear()
    rows = list(bench_score.tiles(shape, 1, "cpu", torch.float32))
    assert all("median_ms" in row for row in rows), rows
    return [row["rival"].removesuffix(", kernels alone") for row in rows]

bench_score.alone = noting
bench_score.FLAT_TILES, bench_score.SCANS = (1024,), (4, 8)
names, own = rows_of_tiles(), projection._options
assert names == [f"tiles of 1024, {scans} programs of a head" for scans in (4, 8)], names
assert [(tile, scans) for tile, *_, scans in seen] == [(1024, 4), (1024, 8)], seen
projection.is_hopper, bench_score.FLAT_TILES = lambda device: True, ()
assert rows_of_tiles() == ["64 rows and 32 of d_k", "128 rows and 32 of d_k", "64 rows and 16 of d_k"]
assert seen == [(None, 4, 32, 4, 4, 2), (None, 8, 32, 8, 2, 2), (None, 4, 16, 4, 4, 2)], seen
assert (tables.FLAT_TILE, tables.SCANS, projection._options) == (2048, 2, own)
models = bench_score.models(shape, 1, "cpu", torch.float32)
for representation, count in (("qkv", 6), ("projection", 128 // 16)):
    shares, _ = bench_score.listed(*models, representation=representation)
    tiles = shares * count  # the first and the last are always listed
    assert shares.shape == (2,) and torch.equal(tiles, tiles.round()) and tiles.min() >= 2 and shares.max() <= 1, shares
"""


@pytest.mark.parametrize("code", [RECORDED, SCORED], ids=["a step", "scores"])
def test_launches_are_recorded_from_the_first_call_and_can_be_repeated(code):
    """Under Triton's interpreter, in a process of its own."""
    settings = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(gpu.ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True,
                         env={**os.environ, **settings})
    assert ran.returncode == 0, ran.stderr[-2000:]
