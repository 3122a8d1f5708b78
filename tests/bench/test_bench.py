"""The benchmarks' own machinery: rows, gate, stages with time limits, the report from rows alone."""

import csv
import sys
import time

import pytest
import torch

from bench import (
    __main__ as bench_main, attention, baselines, bench_adamw, bench_dw, bench_grad_norm, common, gpu, predictions,
    report, timing,
)
from bench.shapes import RATIOS, SHAPES, Shape, heads_of
from tests import compat


def stage(name, code, limit=30.0):
    return gpu.Stage(name, (sys.executable, "-c", code), limit)


def test_a_stage_that_fails_or_hangs_is_recorded_and_the_next_one_runs(tmp_path):
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.perf_counter()
    ends = gpu.run_all((stage("good", "print('hello')"), stage("bad", "raise SystemExit(3)"), stage("hangs", hangs, 5.5),
                        gpu.Stage("absent", ("no-such-tool",), 5.0), stage("last", "print('the end')")), tmp_path)
    assert time.perf_counter() - start < 40
    assert ends["good"].startswith("passed") and ends["last"].startswith("passed")
    assert "exit code 3" in ends["bad"] and "stopped after" in ends["hangs"] and "not installed" in ends["absent"]
    assert "hello" in (tmp_path / "gpu-run.log").read_text() and "the end" in (tmp_path / "gpu-run.log").read_text()


def test_the_last_stage_keeps_its_time(tmp_path):
    ends = gpu.run_all((stage("first", "import time; time.sleep(60)"), stage("second", "pass"), stage("last", "pass", 20)),
                       tmp_path, whole=26)
    assert "stopped" in ends["first"] and "no time" in ends["second"] and ends["last"].startswith("passed")


def test_the_stages_fit_into_ten_minutes():
    assert gpu.WHOLE < 590 and sum(s.limit for s in gpu.STAGES) < 600 and gpu.STAGES[-1].name == "report"


def test_the_paths_of_tests_that_tools_run_exist():
    staged = [word for stage in gpu.STAGES for word in stage.command if word.startswith("tests/")]
    assert staged and all((gpu.ROOT / path).exists() for path in [*staged, *compat.TESTS])


def test_rows_have_every_column_and_say_what_they_were_taken_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("COMMIT", "abc1234")
    for value in (1.0, 2.0):
        path = common.write_rows("some", [{"case": "c", "rival": "ours", "median_ms": value}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == common.COLUMNS and [row["median_ms"] for row in rows] == ["1", "2"]
    assert all(row["commit"] == "abc1234" and row["torch"] and row["device"] and row["date"] for row in rows)


def test_nothing_is_timed_on_a_red_gate(capsys):
    common.gate("fine", True, "equal")
    with pytest.raises(SystemExit, match="parity of this is red"):
        common.gate("this", False, "3 ulp")


def test_measure_orders_its_percentiles():
    took = common.measure(lambda: sum(range(1000)), repeats=10)
    assert 0 < took["p20_ms"] <= took["median_ms"] <= took["p80_ms"]


def test_the_report_shows_rows_and_leaves_the_rest_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    case = "Llama-3.1-8B q/k/v/o, 32 of 32 layers, 10% of heads scattered, 190M elements, bfloat16"
    rows = [{"case": case, "rival": "HeadAdamW", "median_ms": 1.2345}]
    common.write_rows("adamw", rows)
    report.main()
    page = (tmp_path / "results.md").read_text()
    line = next(x for x in page.splitlines() if x.startswith("| Llama-3.1-8B | bf16, fp32 moments, split master"))
    assert "| HeadAdamW | 1.234 |" in page and line.endswith("|  |")  # a CPU's row is shown, and fills no GPU column
    monkeypatch.setattr(common, "device_name", lambda: "NVIDIA H100")
    common.write_rows("adamw", rows)
    report.main()
    filled = (tmp_path / "results.md").read_text()
    assert [x.split(" | ")[1] for x in filled.splitlines() if x.startswith("| Llama-3.1-8B |") and x.endswith("| 1.2345 |")] == [
        "bf16, fp32 moments, split master"]


def test_calls_run_in_turns_and_one_that_cannot_says_why():
    order = []

    def builder(name):
        return lambda: timing.Timed(lambda: order.append(name), lambda: {"bytes": 8})

    def absent():
        raise timing.Unavailable("some package is not installed")

    found = timing.time_each({"a": builder("a"), "gone": absent, "b": builder("b")}, repeats=3)
    assert list(found) == ["a", "gone", "b"] and found["gone"] == {"note": "not run: some package is not installed"}
    assert "".join(order).startswith("aabb" + "ab" * 3)
    rows = timing.rows_of("case", found, 10.0)
    assert rows[0]["ratio"] == 1 and "median_ms" not in rows[1] and rows[2]["ratio"] == found["b"]["p20_ms"] / found["a"]["p20_ms"]


def test_a_baseline_that_is_not_installed_or_fails_is_told_from_one_that_runs(monkeypatch):
    params = [torch.nn.Parameter(torch.zeros(512))]
    assert isinstance(baselines.baseline("torch AdamW fused", params), torch.optim.AdamW)

    def missing(params):
        import no_such_package  # noqa: F401

    def failing(params):
        raise NotImplementedError("a CUDA device is needed\nand more")

    monkeypatch.setattr(baselines, "BASELINES", {"x": ("no-such-package", missing), "y": ("there", failing)})
    with pytest.raises(timing.Unavailable, match="no-such-package is not installed"):
        baselines.baseline("x", params)
    with pytest.raises(timing.Unavailable, match="there on cpu, float32: a CUDA device is needed$"):
        baselines.baseline("y", params)


def test_what_a_call_allocates_is_counted():
    x = torch.ones(1000, 1000)
    assert 8_000_000 <= timing.allocated(lambda: ((x + 1) * 2).sum()) < 8_100_000
    assert timing.allocated(lambda: x.add_(1)) < 1000


def test_the_bench_command_names_what_there_is_and_quick_covers_it(capsys):
    assert bench_main.main(["no-such-bench"]) == 2 and "adamw" in capsys.readouterr().err
    assert set(bench_main.QUICK) == set(bench_main.NAMES)


TINY = Shape("tiny", 2, 96, 6, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adjacent", [True, False])
def test_the_norm_s_and_the_step_s_contestants_run(adjacent, dtype, monkeypatch):
    case = attention.Selected.of(TINY, 2, 0.5, adjacent, dtype)
    rows = bench_grad_norm.run(case, 10.0, 2)
    assert [row["rival"] for row in rows] == ["head_grad_norm", "mask + torch norm", "torch norm, dense"]
    assert rows[0]["bytes"] == case.bound.numel * dtype.itemsize and all(row["median_ms"] > 0 for row in rows)
    monkeypatch.setattr(bench_adamw, "BASELINES", {"torch AdamW fused": baselines.BASELINES["torch AdamW fused"]})
    bench_adamw.parity()
    rows = {row["rival"]: row for row in bench_adamw.run(case, 10.0, 2)}
    per_element = rows["HeadAdamW"]["bytes"] / case.bound.numel
    assert per_element == pytest.approx(28 if dtype == torch.float32 else 26, rel=0.01)
    assert "HeadAdamW moment_dtype=8bit" in rows and "torch AdamW fused, dense" in rows


@pytest.mark.parametrize("part", ["q", "o"])
def test_the_selected_gradient_s_contestants_run(part):
    rows = bench_dw.run(TINY, part, 0.5, False, 24, torch.float32, 10.0, 2)
    assert [row["rival"] for row in rows][::3] == ["head_grad", "whole dW"] and "GFLOP/s" in rows[0]["note"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selections_have_their_size_and_lie_in_the_model(shape):
    for ratio in RATIOS:
        for adjacent in (True, False):
            heads = heads_of(shape, ratio, adjacent=adjacent)
            assert len(set(heads)) == len(heads) == max(1, round(ratio * shape.layers * shape.heads))
            assert all(0 <= layer < shape.layers and 0 <= head < shape.heads for layer, head in heads)
    assert predictions.selected_elements(shape, 1.0) == shape.attention_params
