"""The benchmarks' own machinery: rows, gate, stages with time limits, the report from rows alone."""

import csv
import sys
import time

import pytest

from bench import common, gpu, report
from bench.shapes import RATIOS, SHAPES, heads_of


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
    rows = [{"case": case, "rival": "HeadAdamW master=split", "median_ms": 1.2345}]
    common.write_rows("adamw", rows)
    report.main()
    page = (tmp_path / "results.md").read_text()
    line = next(x for x in page.splitlines() if x.startswith("| Llama-3.1-8B | bf16, fp32 moments, split master"))
    assert "1.2345" in page and line.endswith("|  |")  # a CPU's row is shown, and fills no GPU column
    monkeypatch.setattr(common, "device_name", lambda: "NVIDIA H100")
    common.write_rows("adamw", rows)
    report.main()
    filled = (tmp_path / "results.md").read_text()
    assert [x.split(" | ")[1] for x in filled.splitlines() if x.startswith("| Llama-3.1-8B |") and x.endswith("| 1.2345 |")] == [
        "bf16, fp32 moments, split master"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_selections_have_their_size_and_lie_in_the_model(shape):
    for ratio in RATIOS:
        for adjacent in (True, False):
            heads = heads_of(shape, ratio, adjacent=adjacent)
            assert len(set(heads)) == len(heads) == max(1, round(ratio * shape.layers * shape.heads))
            assert all(0 <= layer < shape.layers and 0 <= head < shape.heads for layer, head in heads)
    assert report.selected_elements(shape, 1.0) == shape.attention_params
