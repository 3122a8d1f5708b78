"""Rows, the gate, the report from rows alone; test_gpu_run.py and test_gpu_rows.py: `make gpu`."""

import csv

import pytest
import torch

from bench import (
    __main__ as bench_main, attention, baselines, bench_adamw, bench_dw, bench_grad_norm, common, h100,
    predicted_scores, predicted_step, predictions, report, timing,
)
from bench.shapes import RATIOS, SHAPES, Shape, heads_of


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


CASE = "Llama-3.1-8B q/k/v/o, 32 of 32 layers, 10% of heads scattered, 200.3M elements, bfloat16"
STEP_ROW = "| Llama-3.1-8B | bf16, fp32 moments, split master |"


def page_of(folder):
    report.main()
    return (folder / "results.md").read_text().splitlines()


def test_the_report_shows_rows_and_leaves_the_rest_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    rows = [{"case": CASE, "rival": "HeadAdamW, kernels alone", "median_ms": 1.2345, "share": 0.95}]
    common.write_rows("adamw", rows)
    lines = page_of(tmp_path)
    assert "| HeadAdamW, kernels alone | 1.234 (95%) |" in lines
    # a CPU's row is shown, and fills no column of what a GPU measured
    assert [line for line in lines if line.startswith(STEP_ROW)][0].endswith("| 1.750 |  |  |  |")
    assert not any("1.234" in line or "95%" in line for line in lines[lines.index("## Predicted for one H100 SXM"):])
    monkeypatch.setattr(common, "device_name", lambda: "NVIDIA H100")
    common.write_rows("adamw", rows)
    lines = page_of(tmp_path)
    line = next(line for line in lines if line.startswith(STEP_ROW))
    assert line.endswith("| 1.750 | 1.234 | -29% | not explained yet |")
    assert sum(line.count("1.234 | -29%") for line in lines) == 1
    key = ("step", "Llama-3.1-8B", "bf16, fp32 moments, split master")
    monkeypatch.setitem(h100.EXPLAINED, key, "the card is faster")
    assert any(line.endswith("| -29% | the card is faster |") for line in page_of(tmp_path))


def test_targets_are_ratios_of_rows_of_one_case(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(common, "device_name", lambda: "NVIDIA H100")
    times = {"HeadAdamW": 2.0, "HeadAdamW, dense": 1.6, "torch AdamW fused, dense": 1.0,
             "torch AdamW fused + mask": 18.0}
    common.write_rows("adamw", [{"case": CASE, "rival": f"{rival}, kernels alone", "median_ms": ms, "share": 0.91}
                                for rival, ms in times.items()])
    found = [line.split(" | ")[1:] for line in page_of(tmp_path)
             if " | bfloat16 | " in line and line.startswith(("| share", "| time"))]
    assert [cells[2:] for cells in found] == [["0.91", "yes |"], ["1.25", "no |"], ["2", " |"], ["9", "yes |"]]


def test_an_old_row_of_the_whole_step_fills_no_kernel_column():
    row = {"device": "NVIDIA H100", "case": CASE, "rival": "HeadAdamW", "median_ms": "1.5"}
    assert not any("1.5 |" in line for line in predicted_step.steps([row]) + predicted_step.targets([row]))


def test_predictions_are_the_arithmetic_they_state():
    # 72 registers of 128 threads: 7 programs an SM; 2,048 elements a program
    assert h100.resident(72) == 132 * 7 and h100.resident(40) == 132 * 12 and h100.resident(16) == 132 * 16
    seconds, waves = h100.streamed(3e9, 2 * 132 * 7, 72)
    assert waves == 2 and seconds == pytest.approx(1e-3 * 1.25 + 3e-6)
    assert h100.compared(2.0, "", ("a", "b", "c")) == " |  | "
    assert h100.compared(2.0, "2.1", ("a", "b", "c")) == "2.1 | +5% | "
    tables = "\n".join(predictions.predicted([], [])).split("\n\n")
    for table in (table.splitlines() for table in tables if table.startswith("| ")):
        assert len({line.count("|") for line in table}) == 1, table[0]


def test_the_step_s_constants_are_those_of_its_plan():
    from importlib import import_module

    tables, plan = (import_module(f"alps_kernels.ops.adamw.{name}") for name in ("tables", "plan"))
    assert (predicted_step.TILE, predicted_step.TABLE) == (tables.TILE, 8 * len(tables.Tile._fields))
    assert (predicted_step.STEP_TILES, predicted_step.NORM_TILES) == (plan.TILES, plan.NORM_TILES)
    assert h100.THREADS == 32 * plan.WARPS[True]


def test_the_projection_s_constants_are_those_of_its_launches(monkeypatch):
    from alps_kernels.ops.delta import projection

    monkeypatch.setattr(projection, "is_hopper", lambda device: True)
    form, *passes = projection._options(128, (torch.bfloat16,), torch.device("cpu"))
    block, tile = predicted_scores.BLOCK, predicted_scores.TILE_ROWS
    expected = {"ROWS": block, "COLS": block, "D_BLOCK": predicted_scores.D_BLOCK, "num_warps": predicted_scores.WARPS}
    assert form == expected and {tile * sizes["RUNS"] for sizes in passes} == {predicted_scores.ROWS}
    assert (tile, predicted_scores.PIECES) == (projection.TILE_ROWS, projection.PIECES)


def test_the_projection_s_bounds_of_one_small_layer():
    shape, formed = Shape("one", 1, 128, 2, 1, 64), predicted_scores.formed
    groups, first = predicted_scores.group_products(shape), formed(shape, "pad")
    assert groups.FLOPs == pytest.approx(5 * 2 * 64 * 128 * 64 / 590e12)
    assert groups.L2 == pytest.approx((64 + 64) * 128 * 4 / 5.5e12)
    assert groups.memory == pytest.approx(((64 + 64) * 128 * 4 + 6 * 64 * 64 * 2) / 3e12)
    # one SM has all: four parts of d
    assert groups.instructions == pytest.approx(4 * predicted_scores.WARPS * predicted_scores.ROUND / (4 * 1.755e9))
    assert first.FLOPs == pytest.approx(11 * 2 * 2 * 128 * 64 * 64 / 590e12)
    # two heads of two programs, which read six pieces each, and q of two models
    assert first.L2 == pytest.approx((2 * 2 * 6 * 64 * 64 * 2 + 2 * 2 * 64 * 128 * 2) / 5.5e12)
    assert first.memory == pytest.approx(2 * 2 * 64 * 128 * 2 / 3e12)
    assert first.instructions / formed(shape, "all metrics").instructions == pytest.approx(51.6 / 64.7)
    ms, tiles = predicted_scores.projection_ms(shape, "pad", True), 2 * 128 // 16
    assert ms == pytest.approx(1e3 * (max(groups) + 1.32 * max(first) + 72 * tiles * (1 / 3e12 + 2 / 5.5e12) + 12e-6))


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
    rows = list(bench_grad_norm.run(case, 10.0, 2))
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
    assert predicted_step.selected_elements(shape, 1.0) == shape.attention_params
