"""Training curves by precision on a tiny model, and the pages and pictures that rows become."""

import pytest
import torch

from alps_kernels import slice_heads
from bench import bench_curves, common, plots, report
from bench.bench_curves import FP32, KINDS, Kind, prepared, rows_of, slices


@pytest.fixture(scope="module")
def tiny():
    from alps_kernels.demo.run import tiny_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alps_kernels.demo.run.smollm2", tiny_model)
        torch.manual_seed(0)
        fresh, task = prepared(None, 6, 4, 2e-5)
    model = fresh()
    return fresh, task, slices(slice_heads(model, task.heads))


def test_bf16_weights_without_a_master_stay_behind_and_a_split_master_does_not(tiny):
    last, end = {}, None
    for kind in (FP32, "bf16, split master", "bf16, none"):
        rows, found = rows_of(kind, "case", *tiny, end)
        end = found if end is None else end
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[-1]["test_loss"] > 0
        last[kind] = rows[-1]
    assert last[FP32]["distance"] == 0 and last[FP32]["same"] < 0.01
    assert last["bf16, none"]["same"] > last["bf16, split master"]["same"]
    assert last["bf16, none"]["distance"] > last["bf16, split master"]["distance"] > 0
    # two float32 moments; two bytes more
    assert last["bf16, split master"]["state_bytes"] - last[FP32]["state_bytes"] == 2 * tiny[2].numel()


def test_runs_of_one_kind_are_equal_to_the_bit(tiny):
    (first, a), (second, b) = (rows_of(FP32, "case", *tiny, None) for _ in range(2))
    assert first == second and torch.equal(a, b)


def test_a_baseline_that_cannot_run_is_one_row_that_says_so(tiny, monkeypatch):
    monkeypatch.setitem(KINDS, "gone", Kind(torch.float32, baseline="gone"))

    def gone(name, params):
        raise bench_curves.Unavailable("gone is not installed")

    monkeypatch.setattr(bench_curves, "baseline", gone)
    rows, found = rows_of("gone", "case", *tiny, None)
    assert rows == [{"case": "case", "kind": "gone", "note": "not run: gone is not installed"}] and found is None


def a_row(**entries):
    return {**dict.fromkeys((*common.COLUMNS, *bench_curves.COLUMNS), ""), "device": "CPU, 1 threads", "torch": "2.13.0", "date": "2026-01-01",
            **entries}


def test_pictures_are_drawn_for_what_there_are_rows_of(tmp_path):
    pytest.importorskip("matplotlib")
    shares = [a_row(case=f"M q/k/v/o, 4 of 4 layers, {share}% of heads scattered, 1.0M elements, float32", rival=rival, median_ms="2.5")
              for share in (1, 10) for rival in ("HeadAdamW", "torch")]
    lines = [a_row(case="M, 1 of 1 layers, 2 heads, chain_sum", kind=kind, step=str(step), loss="1.5")
             for kind in (FP32, "bf16, none", "fp32, 8-bit") for step in (1, 2)]
    no_times = [a_row(case="tiles read twice", rival="qkv", share="0.4"), a_row(case="M", rival="ours", median_ms="1.5")]
    drawn = plots.pictures(tmp_path, {"adamw": shares, "curves": lines, "step": [], "dw": shares[:2], "score": no_times})
    assert drawn == {"adamw": ["adamw.png"], "dw": [], "score": ["score.png"],
                     "curves": ["curves-weights.png", "curves-moments.png"]}
    for name in ("adamw.png", "curves-weights.png", "curves-moments.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_table_says_once_what_its_cases_share():
    rows = [a_row(bench="adamw", case=f"M, 4 of 4 layers, {share}, float32", rival=rival, median_ms=ms, ratio="2", share="0.5", note=note)
            for share in ("1% of heads", "10% of heads") for rival, ms, note in (("ours", "1.5", "28 B"), ("gone", "", "not run: x"))]
    table = report.pivot(rows)
    assert table[0] == "**M, 4 of 4 layers, float32**"
    assert table[2] == "| | 1% | 10% | note |"
    assert table[4:] == ["| ours | 1.5 (2 ×; 50%) | 1.5 (2 ×; 50%) | 28 B |", "| gone | – | – | not run: x |"]


def test_times_of_two_runs_do_not_stand_beside_each_other():
    rows = [a_row(case=case, rival=rival, median_ms=ms, commit=commit) for case, rival, ms, commit in (
        ("A", "ours", "1", "old"), ("A", "gone since", "1", "old"), ("B", "ours", "1", "old"), ("A", "ours", "2", "new"))]
    assert [(row["case"], row["rival"], row["commit"]) for row in report.latest(report.last_run(rows), "rival")] == [
        ("B", "ours", "old"), ("A", "ours", "new")]


def test_training_by_precision_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    rows = [{"case": "M, 1 of 1 layers", "kind": FP32, "step": 2, "loss": 1.25, "test_loss": 1.5, "distance": 0.0, "same": 0.25,
             "state_bytes": 2**20}, {"case": "M, 1 of 1 layers", "kind": "bf16, none", "note": "not run: x"}]
    common.write_rows("curves", rows, bench_curves.COLUMNS)
    report.main()
    page = (tmp_path / "results.md").read_text()
    assert "| fp32 | 2 | 1.250 | 1.500 | 0.000 | 25.0% | 1.0 |" in page and "| bf16, none | not run: x |" in page
