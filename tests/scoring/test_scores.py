"""HeadScores: choosing, comparing, files, and what people read."""

import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from alps_kernels import HeadScores, HeadSelection
from alps_kernels.layout import LayerSummary
from alps_kernels.scoring.comparison import spearman

SUMMARY = [LayerSummary(f"layers.{i}.attn", (0, 0, 1, 1), {"q": 8, "o": 8}, {"k": 8, "v": 8}) for i in range(3)]
PROVENANCE = {"models": {"base": {"name": "one"}, "task": {"name": "two"}}, "versions": {"torch": "2"}}


def scores(values=None, layers=(0, 1, 2), **options) -> HeadScores:
    values = torch.rand(4 * len(layers), generator=torch.Generator().manual_seed(0)) if values is None else values
    return HeadScores(values, layers, [4, 4, 4], **{"metric": "pad", "summary": SUMMARY, "provenance": PROVENANCE} | options)


def test_values_and_positions():
    s = scores(range(12))
    assert len(s) == 12 and list(s)[5] == (1, 1)
    assert s[1, 1] == 5.0 and s.values[2, 3] == 11.0
    assert s.tensor.dtype == torch.float64
    assert s.ranking()[:2] == [(2, 3), (2, 2)]
    assert s.rows()[6] == {"layer": 1, "head": 2, "group": 1, "module": "layers.1.attn", "score": 6.0, "rank": 6}


def test_layers_that_were_not_scored():
    s = scores(range(8), layers=(0, 2))
    assert s[2, 0] == 4.0 and s.ranking()[0] == (2, 3)
    grid = s.matrix()
    assert grid.shape == (3, 4) and grid[1].isnan().all() and grid[2, 3] == 7.0
    with pytest.raises(IndexError, match="layer 1 was not scored.*0, 2"):
        s[1, 0]
    with pytest.raises(IndexError, match="head 4 is not in layer 2, which has 4 heads"):
        s[2, 4]
    top = s.top(1.0)
    assert top.heads_per_layer == (4, 4, 4) and {layer for layer, _ in top} == {0, 2}


def test_layers_of_unequal_width():
    s = HeadScores([3.0, 1.0, 2.0], (0, 1), (2, 1), metric="kl")
    assert s.matrix()[1].isnan().tolist() == [False, True]
    assert list(s.top(k=1, scope="layer")) == [(0, 0), (1, 0)]


@pytest.mark.parametrize("ratio, n, k", [(0.1, 270, 27), (0.1, 1024, 103), (0.3, 10, 3), (0.7, 10, 7), (0.07, 100, 7),
                                         (0.0, 12, 0), (1.0, 12, 12), (1e-9, 12, 1), (0.29, 100, 29)])
def test_top_keeps_the_ceiling_without_float_error(ratio, n, k):
    s = HeadScores(torch.rand(n, dtype=torch.float64), [0], [n], metric="pad")
    assert len(s.top(ratio)) == k


def test_top_breaks_ties_by_position():
    assert list(scores([1.0] * 12).top(k=5)) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert list(scores([0.0, 2, 2, 0] * 3).top(k=3)) == [(0, 1), (0, 2), (1, 1)]


def test_top_carries_options_and_provenance():
    heads = scores(range(12)).top(k=1, kv="all", parts=("q", "o"))
    assert (heads.kv, heads.parts, heads.summary) == ("all", ("q", "o"), tuple(SUMMARY))
    assert heads.provenance["metric"] == "pad" and heads.provenance["scores"] == PROVENANCE


@pytest.mark.fault("Bad input", "ratios, counts and scopes that cannot be, of scores")
@pytest.mark.parametrize("options", [{}, {"ratio": 0.1, "k": 1}, {"ratio": 1.01}, {"ratio": -0.1}, {"ratio": math.nan},
                                     {"k": 13}, {"k": -1}, {"ratio": 0.1, "scope": "head"}, {"ratio": True}])
def test_top_refuses(options):
    with pytest.raises(ValueError):
        scores().top(**options)


@settings(deadline=None)  # the cores are shared
@given(st.lists(st.floats(0, 1), min_size=12, max_size=12), st.floats(0, 1))
def test_top_is_the_best(values, ratio):
    s = scores(values)
    top = s.top(ratio)
    rest = ~top
    assert min((s[h] for h in top), default=math.inf) >= max((s[h] for h in rest), default=-math.inf)
    assert len(top) + len(rest) == 12


@pytest.mark.fault("Bad input", "scores that are not finite, or of other heads: named")
@pytest.mark.parametrize("values, layers, per_layer, message", [
    ([1.0], [0], [2], "scores for 2 heads"),
    ([1.0, math.nan], [0], [2], r"head \(0, 1\) is nan"),
    ([1.0, math.inf], [0], [2], r"head \(0, 1\) is inf"),
    ([1.0], [1], [1], "ascending indices below 1"),
    ([1.0, 1.0], [1, 0], [1, 1], "ascending"),
])
def test_refuses_what_cannot_be(values, layers, per_layer, message):
    with pytest.raises(ValueError, match=message):
        HeadScores(values, layers, per_layer, metric="pad")


# -- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s.json", "s.safetensors"])
def test_files_keep_every_bit(tmp_path, name):
    values = torch.rand(8, dtype=torch.float64) * 1e-300
    values[0] = 1 / 3
    s = scores(values, layers=(0, 2), temperature=0.7, representation="qkv")
    s.save(tmp_path / name)
    loaded = HeadScores.load(tmp_path / name)
    assert torch.equal(loaded.tensor.view(torch.int64), s.tensor.view(torch.int64))
    for what in ("layers", "heads_per_layer", "metric", "representation", "temperature", "summary", "provenance", "heads"):
        assert getattr(loaded, what) == getattr(s, what)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scores.npz ends in '.npz'.*json or .safetensors"):
        scores().save(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="ends in ''"):
        HeadScores.load(tmp_path / "scores")


@pytest.mark.fault("Bad input", "score files cut at five places: refused by file")
@pytest.mark.parametrize("name", ["s.json", "s.safetensors"])
def test_torn_files_are_refused(tmp_path, name):
    path = tmp_path / name
    scores().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=name):
            HeadScores.load(path)
    with pytest.raises(FileNotFoundError):
        HeadScores.load(tmp_path / "none" / name)


@pytest.mark.fault("Bad input", "score files with an entry of the wrong kind: refused by file")
@pytest.mark.parametrize("change", [
    {"format": "other"}, {"version": 2}, {"version": True}, {"metric": 3}, {"temperature": 0}, {"temperature": "1"},
    {"layers": [0, 1, 9]}, {"layers": ["0"]}, {"layers": 3}, {"heads_per_layer": [4, 4, 10**30]},
    {"heads_per_layer": [4, 4]}, {"values": [1.0]}, {"values": ["1.0"] * 12}, {"values": None}, {"values": [[1.0] * 12]},
    {"values": [10**400] * 12}, {"summary": [{}]}, {"summary": [1, 2, 3]}, {"provenance": [1]},
])
def test_hostile_json_is_refused(tmp_path, change):
    path = tmp_path / "s.json"
    scores().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match="s.json"):
        HeadScores.load(path)


@pytest.mark.fault("Bad input", "score files that lack an entry: refused by file and entry")
@pytest.mark.parametrize("missing", ["values", "metric", "layers", "heads_per_layer", "summary", "provenance"])
def test_json_that_lacks_something_is_refused(tmp_path, missing):
    path = tmp_path / "s.json"
    scores().save(path)
    document = json.loads(path.read_text())
    del document[missing]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"s.json.*'{missing}' is missing"):
        HeadScores.load(path)


def test_someone_elses_safetensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    save_file({"scores": torch.rand(12, dtype=torch.float64)}, path)
    with pytest.raises(ValueError, match="s.safetensors.*hold no scores"):
        HeadScores.load(path)


# -- comparing -------------------------------------------------------------------------------


def test_compare():
    a, b = scores(range(12)), scores([0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 10, 9])
    found = a.compare(b, k=2)
    assert (found.k, found.shared, found.jaccard, found.share) == (2, 1, 1 / 3, 0.5)
    assert a.compare(a).spearman == pytest.approx(1.0) and a.compare(a).k == 2
    assert "Spearman 1.0000" in str(a.compare(a))
    with pytest.raises(ValueError, match="12 heads in 3 layers, the others of 8 heads in 2"):
        a.compare(scores(layers=(0, 1)))
    with pytest.raises(TypeError, match="HeadSelection"):
        a.compare(HeadSelection.none(a))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=20))
def test_spearman_is_scipys(pairs):
    from scipy.stats import spearmanr

    a, b = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    if len(set(a.tolist())) == 1 or len(set(b.tolist())) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


# -- for people ------------------------------------------------------------------------------


def test_printing_tells_close_scores_apart():
    s = scores([0.125 + i * 1e-9 for i in range(12)])
    text = str(s)
    assert "pad of projection: one to two; 12 heads in 3 layers" in text
    assert len({line.split()[3] for line in text.splitlines()[2:14]}) == 12
    assert "layers.2.attn" in text and "median" in text
    assert "12 heads" in repr(s)


def test_printing_is_short_and_empty_scores_print():
    many = HeadScores(torch.rand(400, dtype=torch.float64), [0], [400], metric="js")
    assert len(str(many).splitlines()) == 24 and "380 more" in str(many)
    assert "0 heads" in str(HeadScores([], [], [4], metric="js"))


@pytest.mark.parametrize("values", [range(1, 13), [10.0 ** -i for i in range(12)], [0.0] * 12])
def test_plot_writes_a_picture(tmp_path, values):
    s = scores(values)
    s.plot(tmp_path / "heat.png", heads=s.top(k=3))
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")
    s.plot(tmp_path / "heat.svg")
    assert b"<svg" in (tmp_path / "heat.svg").read_bytes()


def test_every_kind_of_picture_is_written(tmp_path):
    s, other = scores([10.0**-i for i in range(12)]), scores(list(range(12)))
    s.plot(tmp_path / "h.png", heads=s.top(k=3), kind="histogram")
    s.plot(tmp_path / "plain.pdf", kind="histogram")
    s.plot(tmp_path / "o.svg", kind="overlap", other=other, ratio=0.25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.png", "o.svg", "plain.pdf"]
    drawn = (tmp_path / "o.svg").read_text()
    counts = s.compare(other, ratio=0.25)
    assert f"B: both ({counts.shared})" in drawn and f"Jaccard {counts.jaccard:.2f}" in drawn
    for wrong in ({"kind": "pie"}, {"kind": "overlap"}, {"other": other}):
        with pytest.raises(ValueError, match="kind"):
            s.plot(tmp_path / "w.png", **wrong)
    with pytest.raises(ValueError, match="the others of"):
        s.plot(tmp_path / "w.png", kind="overlap", other=HeadScores([1.0], [0], [1], metric="pad"))
    assert not (tmp_path / "w.png").exists()


def test_one_far_head_does_not_take_the_scale_of_colours():
    from alps_kernels.scoring.plots import _norm

    near = [1e-3 * (1 + i / 100) for i in range(120)]
    norm, beyond = _norm(HeadScores([1e-20, *near[1:]], [0], [120], metric="pad"))
    assert norm.vmin > 1e-4 and norm.vmax == near[-1] and beyond == "min"
    norm, beyond = _norm(HeadScores(near, [0], [120], metric="pad"))
    assert (norm.vmin, norm.vmax, beyond) == (near[0], near[-1], "neither")


def test_curves_and_memory_bars_are_written(tmp_path):
    from alps_kernels.scoring import curves, memory_bars

    curves(tmp_path / "c.svg", {"fp32": [(1, 2.0), (2, 1.0)], "8-bit": [(1, 2.0), (2, 1.1)]}, title="losses")
    assert "8-bit" in (tmp_path / "c.svg").read_text()
    memory_bars(tmp_path / "m.svg", {"full": {"gradients": 3 * 2**30, "state": 6 * 2**30}, "heads": {"state": 2**20}})
    assert "GiB" in (tmp_path / "m.svg").read_text()
    for empty in (lambda: curves(tmp_path / "w.png", {"a": []}), lambda: memory_bars(tmp_path / "w.png", {})):
        with pytest.raises(ValueError, match="nothing to draw"):
            empty()


def test_plot_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="heads are of a model"):
        scores().plot(tmp_path / "h.png", heads=HeadSelection([], [4]))
    with pytest.raises(ValueError, match="nothing to draw"):
        HeadScores([], [], [4], metric="js").plot(tmp_path / "h.png")
    with pytest.raises(ValueError, match="xyz"):
        scores().plot(tmp_path / "h.xyz")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'alps-kernels\[plot\]'"):
        scores().plot(tmp_path / "h.png")
    assert list(tmp_path.iterdir()) == []
