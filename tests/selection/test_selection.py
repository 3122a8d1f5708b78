"""Selections: which heads, and what they mean on a model."""

import json
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, strategies as st
from torch import nn

from alps_kernels import HeadSelection
from alps_kernels.layout import AttentionLayer, HeadLayout, HeadSlice
from alps_kernels.selection import BoundParam, resolve_count, top_count
from alps_kernels.selection.binding import trained_groups
from alps_kernels.tensors import complement, merge

HEADS, GROUPS, DIM, WIDTH = 4, 2, 3, 10


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.k = nn.Linear(WIDTH, GROUPS * DIM, bias=False)
        self.v = nn.Linear(WIDTH, GROUPS * DIM, bias=False)
        self.o = nn.Linear(HEADS * DIM, WIDTH)


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))


def layout_of(model):
    layers, shapes = [], {name: tuple(p.shape) for name, p in model.named_parameters()}
    for i in range(len(model.layers)):
        at = f"layers.{i}"
        heads = tuple(
            (HeadSlice(f"{at}.q.weight", "q", 0, h * DIM, h * DIM + DIM),
             HeadSlice(f"{at}.q.bias", "q", 0, h * DIM, h * DIM + DIM, bias=True),
             HeadSlice(f"{at}.o.weight", "o", 1, h * DIM, h * DIM + DIM)) for h in range(HEADS))
        groups = tuple(
            (HeadSlice(f"{at}.k.weight", "k", 0, g * DIM, g * DIM + DIM),
             HeadSlice(f"{at}.v.weight", "v", 0, g * DIM, g * DIM + DIM)) for g in range(GROUPS))
        layers.append(AttentionLayer(i, at, "self", "", heads, groups, (0, 0, 1, 1)))
    return HeadLayout(tuple(layers), shapes, "toy")


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def layout(model):
    return layout_of(model)


def ranges(bound):
    return {part.name: part.ranges for part in bound.params}


@pytest.mark.parametrize("ratio, n, expected", [
    (0.1, 270, 27), (0.1, 271, 28), (0, 9, 0), (1, 9, 9), (1e-9, 9, 1), (0.3, 10, 3), (0.7, 10, 7), (2 / 3, 3, 2)])
def test_top_count_is_the_ceiling_of_the_ratio(ratio, n, expected):
    assert top_count(ratio, n) == expected


@given(st.integers(0, 2000), st.integers(1, 1000))
def test_top_count_agrees_with_exact_fractions(numerator, n):
    numerator = min(numerator, 1000)
    assert top_count(numerator / 1000, n) == -(-numerator * n // 1000)


@pytest.mark.fault("Bad input", "ratios outside 0 to 1, and what is no number")
@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf, "0.1", None, True])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    with pytest.raises(ValueError, match="ratio"):
        top_count(ratio, 10)


@pytest.mark.fault("Bad input", "both of ratio and k, neither, or a k out of range")
@pytest.mark.parametrize("arguments", [(None, None), (0.1, 3), (None, -1), (None, 11), (None, 1.0), (None, True)])
def test_exactly_one_of_ratio_and_k(arguments):
    with pytest.raises(ValueError):
        resolve_count(10, *arguments)


@pytest.mark.fault("Bad input", "heads out of range, given twice, or no pairs of whole numbers: named")
@pytest.mark.parametrize("heads, message", [
    ([(0, 4)], r"layer 0 has 4 heads"), ([(2, 0)], "2 layers"), ([(0, 1), (0, 1)], r"\(0, 1\) is given twice"),
    ([(-1, 0)], "expected whole"), ([(0, 1.0)], "expected whole"), ([(0, True)], "expected whole"),
    ([3], "not a .layer, head. pair"), ([(1, 2, 3)], "not a .layer, head. pair"), (["ab"], "expected whole")])
def test_bad_heads_are_named(heads, message):
    with pytest.raises(ValueError, match=message):
        HeadSelection(heads, [4, 4])


@pytest.mark.fault("Bad input", "policies and parts that are none")
@pytest.mark.parametrize("options", [{"kv": "some"}, {"parts": "qkv"}, {"parts": ()}, {"parts": ("x",)}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        HeadSelection([], [4], **options)


def test_a_slice_is_oriented_as_in_a_linear_layer():
    weight = torch.arange(60.0).view(6, 10)
    assert torch.equal(HeadSlice("w", "q", 0, 2, 4).matrix(weight), weight[2:4])
    assert torch.equal(HeadSlice("w", "k", 1, 2, 4).matrix(weight), weight[:, 2:4].t())  # Conv1D
    assert torch.equal(HeadSlice("w", "o", 1, 2, 4).matrix(weight), weight[:, 2:4])
    assert torch.equal(HeadSlice("w", "o", 0, 2, 4).matrix(weight), weight[2:4].t())  # Conv1D


def test_set_operations(layout):
    a, b = HeadSelection([(0, 0), (1, 3)], [4, 4]), HeadSelection([(1, 3), (1, 1)], [4, 4])
    assert (a | b).heads == ((0, 0), (1, 1), (1, 3))
    assert (a & b).heads == ((1, 3),)
    assert (a - b).heads == ((0, 0),)
    assert (a ^ b).heads == ((0, 0), (1, 1))
    assert len(~a) == 6 and not set(~a) & set(a)
    assert (0, 0) in a and (0, 1) not in a
    with pytest.raises(ValueError, match="kv"):
        a | HeadSelection([], [4, 4], kv="none")
    with pytest.raises(ValueError, match="heads_per_layer"):
        a | HeadSelection([], [4, 5])


def test_set_operations_of_a_subclass_give_plain_selections():
    class First(HeadSelection):
        def __init__(self, n):
            super().__init__([(0, head) for head in range(n)], [4])

    for found in (First(2) | First(3), ~First(1), First(3) - HeadSelection([(0, 0)], [4])):
        assert type(found) is HeadSelection


def test_baselines(layout):
    assert len(HeadSelection.random(layout, 0.25)) == 2
    assert HeadSelection.random(layout, k=3, seed=1) == HeadSelection.random(layout, k=3, seed=1)
    assert any(HeadSelection.random(layout, k=3, seed=s) != HeadSelection.random(layout, k=3) for s in range(1, 5))
    consistent = HeadSelection.layer_consistent(layout, 0.25)
    assert [layer for layer, _ in consistent] == [0, 1]
    assert len(HeadSelection.all(layout)) == 8 and len(HeadSelection.none(layout)) == 0


@pytest.mark.parametrize("kv, groups", [("any", {0, 1}), ("none", set()), ("all", {1})])
def test_kv_policy(kv, groups):
    assert trained_groups([0, 2, 3], (0, 0, 1, 1), kv) == groups


def test_bind_names_the_ranges_of_the_selected_heads(model, layout):
    bound = HeadSelection([(0, 0), (0, 1), (0, 3)], [4, 4]).bind(model, layout=layout)
    assert ranges(bound) == {
        "layers.0.q.weight": ((0, 6), (9, 12)), "layers.0.q.bias": ((0, 6), (9, 12)),
        "layers.0.k.weight": ((0, 6),), "layers.0.v.weight": ((0, 6),)}
    full = {part.name: part.full for part in bound.params}
    assert full["layers.0.k.weight"] and not full["layers.0.q.weight"]
    assert bound.numel == 9 * WIDTH + 9 + 2 * 6 * WIDTH


def test_bind_cuts_the_output_projection_into_columns(model, layout):
    bound = HeadSelection([(1, 2)], [4, 4], parts=("o",)).bind(model, layout=layout)
    part, = bound.params
    assert (part.name, part.dim, part.ranges) == ("layers.1.o.weight", 1, ((6, 9),))
    of_heads = rearrange(model.layers[1].o.weight, "width (heads d) -> heads (width d)", heads=HEADS)
    assert torch.equal(part.cut(part.param), of_heads[2])


def test_rest_trainable_leaves_out_the_other_heads_only(model, layout):
    bound = HeadSelection([(0, 0)], [4, 4]).bind(model, rest="trainable", layout=layout)
    trained = ranges(bound)
    assert trained["layers.0.q.weight"] == ((0, 3),) and trained["layers.0.k.weight"] == ((0, 3),)
    assert trained["embed.weight"] == ((0, 7),) and trained["layers.1.o.weight"] == ((0, 10),)
    assert "layers.1.q.weight" not in trained


def test_freeze_sets_requires_grad_and_is_remembered(model, layout):
    heads = HeadSelection([(0, 0)], [4, 4])
    heads.freeze(model, layout=layout)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "layers.0.q.weight", "layers.0.q.bias", "layers.0.k.weight", "layers.0.v.weight"}
    assert heads.bind(model, layout=layout).rest == "frozen"
    heads.freeze(model, rest="trainable", layout=layout)
    assert model.embed.weight.requires_grad and not model.layers[1].q.weight.requires_grad
    assert heads.bind(model, layout=layout).rest == "trainable"
    with pytest.raises(ValueError, match="rest"):
        heads.freeze(model, rest="thawed", layout=layout)


def test_bind_refuses_another_model(model, layout):
    with pytest.raises(ValueError, match="8 heads in 2 layers"):
        HeadSelection([(0, 0)], [4, 4, 4]).bind(model, layout=layout)


@pytest.mark.parametrize("kv", ["any", "none", "all"])
@pytest.mark.parametrize("parts", [("q", "k", "v"), ("q", "k", "v", "o"), ("o",)])
def test_the_count_is_what_binding_trains(model, layout, kv, parts):
    heads = HeadSelection.random(layout, k=3, seed=5, kv=kv, parts=parts)
    assert sum(heads.count().trained.values()) == heads.bind(model, layout=layout).numel


def test_honest_share_counts_shared_groups(layout):
    count = HeadSelection([(0, 0)], [4, 4]).count(layout)
    assert count.share(("q",)) == pytest.approx(1 / 8)
    assert count.share(("k",)) == pytest.approx(1 / 4)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))))
def test_merge_and_complement_partition_the_axis(spans):
    spans = [(min(s), max(s)) for s in spans]
    merged = merge(spans)
    covered = {i for a, b in merged for i in range(a, b)}
    assert covered == {i for a, b in spans for i in range(a, b)}
    assert all(a[1] < b[0] for a, b in zip(merged, merged[1:], strict=False))
    rest = {i for a, b in complement(merged, 20) for i in range(a, b)}
    assert covered | rest == set(range(20)) and not covered & rest


@given(st.integers(0, 1), st.sets(st.integers(0, 5)), st.sampled_from([(6, 6), (6, 2, 3)]))
def test_cut_and_spread_are_inverse(dim, chosen, shape):
    param = nn.Parameter(torch.randn(shape))
    part = BoundParam("w", param, dim, merge((i, i + 1) for i in chosen))
    assert part.cut(param).numel() == part.numel
    out = torch.full(shape, torch.nan)
    part.spread(part.cut(param), out)
    inside = torch.zeros(6, 6, dtype=torch.bool)
    for i in chosen:
        inside.select(dim, i).fill_(True)
    inside = inside.view(shape)
    assert torch.equal(out[inside], param.detach()[inside]) and out[~inside].isnan().all()


def test_save_and_load(tmp_path, layout):
    heads = HeadSelection.random(layout, k=3, provenance={"from": "a test"})
    heads.save(tmp_path / "heads.json")
    loaded = HeadSelection.load(tmp_path / "heads.json")
    assert loaded == heads and loaded.summary == heads.summary and loaded.provenance == heads.provenance
    assert str(loaded) == str(heads) and "of q/k/v" in str(loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["heads.json"]


@pytest.mark.fault("Bad input", "heads files with an entry missing or of the wrong kind: refused by file")
@pytest.mark.parametrize("damage", [
    lambda d: d.update(format="other"), lambda d: d.update(version=2), lambda d: d.update(version=True),
    lambda d: d.pop("heads"), lambda d: d.update(heads=[[0, 99]]), lambda d: d.update(heads=[[0, 0], [0, 0]]),
    lambda d: d.update(heads={"0": 1}), lambda d: d.update(heads=[[0, "1"]]), lambda d: d.update(heads=None),
    lambda d: d.update(heads_per_layer=[4, 5]), lambda d: d.update(heads_per_layer="44"),
    lambda d: d.update(kv=[]), lambda d: d.update(parts="qkv"), lambda d: d.update(parts=[1]),
    lambda d: d.update(provenance=[]), lambda d: d.update(summary=[1]), lambda d: d["summary"][0].update(group_of=[9] * 4),
    lambda d: d["summary"][0].update(head_size={"q": -1}), lambda d: d["summary"][0].update(head_size=[])])
def test_a_damaged_file_is_refused_by_name(tmp_path, layout, damage):
    path = tmp_path / "heads.json"
    HeadSelection.all(layout).save(path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="heads.json"):
        HeadSelection.load(path)


@pytest.mark.fault("Bad input", "heads files that are torn, binary or nested without end: refused by file")
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"format": NaN}', b"1"])
def test_a_foreign_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="heads.json"):
        HeadSelection.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, layout, monkeypatch):
    path = tmp_path / "heads.json"
    HeadSelection.none(layout).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        HeadSelection.all(layout).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["heads.json"]
