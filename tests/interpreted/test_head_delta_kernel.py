"""The scoring kernels, run by the interpreter, against the oracle and against long doubles."""

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import cpu, oracle as plain, tables as delta_tables
from tests.ops.delta_cases import pair, segment
from tests.ops.delta_oracle import oracle, stored_oracle

TOLERANCE = 1e-6  # relative, every metric
SMALL = {"FLAT_TILE": 128, "LANES": 4, "TILE": 64, "RUNS": 4, "SLOTS": 4, "SCANS": 2}  # two chunks of a flat tile
# Few programs: the interpreter's time is that of its operators, however long their tensors.
SIDE_BY_SIDE = {"FLAT_TILE": 2**20, "LANES": 32, "TILE": 128, "RUNS": 64, "SLOTS": 64, "SCANS": 2}
LARGE = {
    "test_every_kind_of_change", "test_most_tiles_are_not_listed", "test_concentrated_softmax",
    "test_cosine_of_weights_that_shrink", "test_unsound_weights_are_refused_by_head",
}
KINDS = {  # of changes: what is added to weights, before it is scaled
    "iid": lambda draw, n, rows, cols: draw(n, rows, cols),
    "rank 1": lambda draw, n, rows, cols: draw(n, rows, 1) * draw(n, 1, cols),
    "rank 8": lambda draw, n, rows, cols: draw(n, rows, 8) @ draw(n, 8, cols) / 8**0.5,
    "shrink": lambda draw, n, rows, cols: draw(n, rows, cols),  # of 0.99 times the base
    "shift": lambda draw, n, rows, cols: 1 + draw(n, rows, cols),
    "sparse": lambda draw, n, rows, cols: draw(n, 1, cols) * (torch.arange(rows) == rows // 3)[:, None],
}
LEFT_OVER = {
    "test_a_weight_far_from_its_base", "test_a_dominating_weight_that_moves",
    "test_dominating_weights_that_move_together", "test_concentrated_softmax",
    "test_logits_out_of_range", "test_a_temperature_beyond_float32",
    "test_cosine_of_weights_that_shrink", "test_identical_models_score_exactly_zero",
    "test_a_head_of_few_weights", "test_a_shift_of_all_weights", "test_every_kind_of_change",
    "test_a_shift_that_outdoes_the_rest", "test_changes_that_undo_each_other", "test_squares_beyond_float32",
}
SUMMED = [name for name in METRICS if name != "pad_values"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    resize(monkeypatch, SIDE_BY_SIDE if request.node.originalname in LARGE else SMALL)


def resize(monkeypatch, sizes):
    for name, size in sizes.items():
        monkeypatch.setattr(delta_tables, name, size)


@pytest.fixture
def kept(monkeypatch):
    """(tables, sums) of every launch."""
    seen, run = [], delta_tables.Tables.run
    monkeypatch.setattr(delta_tables.Tables, "run",
                        lambda self, *given: (seen.append((self, run(self, *given))), seen[-1][1])[1])
    return seen


@pytest.fixture(autouse=True)
def left_over(request, monkeypatch):
    """The kernels leave no head to the CPU backend but in tests of such heads."""
    heads = []
    for name in ("head_delta", "head_delta_projection"):
        backend = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda layers, metrics, backend=backend, **options: (
            heads.extend(layers[0][0].index), backend(layers, metrics, **options))[1])
    yield heads
    assert not heads or request.node.originalname in LEFT_OVER


def error(found, expected):
    return ((found - expected).abs() / expected.abs().clamp(min=1e-300)).max()


def close(found, expected, metrics=SUMMED, tolerance=None):
    for name in metrics:
        wrong, most = error(found[name], expected[name]), (tolerance or {}).get(name, TOLERANCE)
        assert wrong <= most, (name, float(wrong))


def changed(kind, delta, dtype, shape=(64, 128), seed=0):
    """A layer of two heads that share k and v, changed so."""
    generator = torch.Generator().manual_seed(seed)
    draw, parts = lambda *shape: torch.randn(*shape, generator=generator), []
    for n, index in ((2, (0, 1)), (1, (0, 0)), (1, (0, 0))):
        base = (0.05 * draw(n, *shape)).to(dtype)
        task = base.float() * (0.99 if kind == "shrink" else 1.0) + delta * KINDS[kind](draw, n, *shape)
        parts.append(Segment(base, task.to(dtype), index))
    return parts


@pytest.mark.parametrize("rows, cols, why", [
    (4, 64, "two flat tiles"), (7, 21, "rows of less than a tile"), (1, 257, "a tail of one element"),
    (16, 40, "five flat tiles: more than SLOTS, carries add up"), (5, 72, "two tiles a row, the second with a tail")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_metric_equals_the_oracle(rows, cols, why, dtype):
    layer = [segment(2, rows, cols, dtype=dtype, delta=1e-2)]
    found = head_delta([layer], SUMMED, backend="triton")
    close(found, stored_oracle([layer]))
    close(found, plain.head_delta([layer], SUMMED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_change(kind, dtype, left_over):
    layers = [changed(kind, delta, dtype) for delta in (1e-2, 1e-3, 1e-4, 1e-5)]
    pad = 5e-6 if kind == "shift" else 1e-6
    tolerance = {**dict.fromkeys(SUMMED, 2e-7), "pad": pad, "pad_index": pad}
    close(head_delta(layers, SUMMED, backend="triton"), stored_oracle(layers), tolerance=tolerance)
    assert kind == "shrink" or not left_over


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_tiles_of_several_chunks(dtype, monkeypatch):
    resize(monkeypatch, {"FLAT_TILE": 1024, "LANES": 16})
    layers = [changed(kind, 1e-3, dtype, (32, 96)) for kind in ("iid", "rank 1")]
    close(head_delta(layers, ["pad"], backend="triton"), stored_oracle(layers), ["pad"])


def test_most_tiles_are_not_listed(kept):
    layers = [changed("iid", 1e-3, torch.float32, seed=seed) for seed in range(4)]
    for part in layers[0]:  # head 0 stays
        part.task[0] = part.base[0]
    found = head_delta(layers, ["pad"], backend="triton")["pad"]
    listed = kept[0][1].s.listed
    assert listed[0] == 0 and found[0] == 0 and (listed[1:] > 0).all()
    assert listed.sum() < 0.5 * 8 * 3 * 64, listed


def test_a_head_beside_moved_ones_stays_at_exactly_zero():
    base, task = pair((3, 16, 40))
    task[1] = base[1]
    found = head_delta([[Segment(base, task, (0, 1, 2))]], SUMMED, backend="triton")
    assert all(found[name][1] == 0 and found[name][0] > 0 and found[name][2] > 0 for name in SUMMED)


def test_matrices_are_read_once_and_only_those_of_a_head(monkeypatch):
    grids, code = [], delta_tables.device_code

    def watched(name):
        kernels = code(name)
        if name != "head_delta":
            return kernels
        return SimpleNamespace(head_delta_scan_kernel=kernels.head_delta_scan_kernel, head_delta_stats_kernel=Watched(kernels))

    class Watched:
        def __init__(self, kernels):
            self.kernels = kernels

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernels.head_delta_stats_kernel[grid]

    monkeypatch.setattr(delta_tables, "device_code", watched)
    q, k = segment(5, 16, 40, (0, 3, 4, 4)), segment(3, 16, 40, (0, 0, 2, 2), seed=1)
    v = segment(2, 8, 40, (0, 0, 1, 1), seed=2)
    for part, unread in ((q, [1, 2]), (k, [1])):
        part.base[unread] = part.task[unread] = torch.nan
    found = head_delta([[q, k, v]], ["pad", "kl"], backend="triton")
    close(found, stored_oracle([[q, k, v]]), ["pad", "kl"])
    assert grids == [((3 + 2) * 5,), (2 * 2,)]  # matrices by programs of each


@pytest.mark.parametrize("sizes", [SMALL, SIDE_BY_SIDE])
def test_near_and_far_tiles_side_by_side(sizes, monkeypatch):
    """Of tiles that one program of pass B takes together, those that are near have divergences from pass A."""
    resize(monkeypatch, sizes)
    base, task = pair((2, 9, 72))
    task[0, 4, 70] += 0.1
    task[1, ::2] += 0.05
    flat = segment(2, 8, 64, delta=1e-2, seed=1)  # and those of another kind are of another launch
    layer = [Segment(base, task, (0, 1)), flat]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


@pytest.mark.parametrize("rows, cols", [(1, 1), (3, 21), (1, 48)])
def test_a_head_of_few_weights(rows, cols):
    layer = [segment(2, rows, cols, delta=1e-2)]
    metrics = SUMMED if rows * cols > 1 else ["euclidean", "relative"]
    close(head_delta([layer], metrics, backend="triton"), stored_oracle([layer]), metrics)


def test_a_shift_of_all_weights():
    """It moves no probability: what float32 leaves is rounding, and not silently taken for a score."""
    base, _ = pair((1, 16, 40))
    layer = [Segment(base, base + 0.01, (0,))]
    close(head_delta([layer], ["pad"], backend="triton"), stored_oracle([layer]), ["pad"])


@pytest.mark.parametrize("times", [1.0, 2.0, 5.0, 8.0])
def test_a_shift_that_outdoes_the_rest(times):
    base, noise = pair((2, 16, 129)), 1e-3 * torch.randn(2, 16, 129, generator=torch.Generator().manual_seed(1))
    layer = [Segment(base[0], base[0] + 1e-3 * times + noise, (0, 1))]
    found, expected = head_delta([layer], ["pad"], backend="triton"), stored_oracle([layer])
    torch.testing.assert_close(found["pad"], expected["pad"], rtol=5e-6, atol=0)


@pytest.mark.parametrize("base, moves", [(0.02, 1e-3), (0.5, 2**-6)])
def test_changes_that_undo_each_other(base, moves):
    """Next to nothing of them is left in the CDF difference, which their rounding would fill."""
    weights = base * torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(2)) if base < 0.1 else (
        torch.full((1, 16, 128), base))
    layer = [Segment(weights, weights + moves * (1 - 2 * (torch.arange(128) % 2)), (0,))]
    close(head_delta([layer], ["pad"], backend="triton"), stored_oracle([layer]), ["pad"])


def test_squares_beyond_float32():
    base, task = (x.clone() for x in pair((3, 8, 40)))
    base[0, 0, 0] = task[0, 0, 0] = -1e30  # of which the sum of squares is infinite
    base[1:], task[1:] = 0.0, torch.tensor([1e-30, 1e-22])[:, None, None]  # of which it is 0, or faint
    layer, metrics = [Segment(base, task, (0, 1, 2))], ["euclidean", "relative", "cosine_weights"]
    found, expected = head_delta([layer], metrics, backend="triton"), stored_oracle([layer])
    torch.testing.assert_close(found["euclidean"], expected["euclidean"], rtol=1e-6, atol=0)
    for name in metrics[1:]:
        assert found[name][0] == pytest.approx(float(expected[name][0]), rel=1e-6, abs=0)


@pytest.mark.parametrize("delta", [1e-2, 4e-3, 1e-3, 1e-4, 1e-5])  # 4e-3: just within the short series of expm1
def test_small_differences_survive(delta):
    layer = [segment(1, 16, 129, delta=delta)]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


def test_grouped_heads_several_segments_and_layers_of_other_shapes():
    group = (0, 0, 1, 1)
    first = [segment(4, 8, 32), segment(2, 8, 32, group, seed=1), segment(2, 4, 32, group, seed=2)]
    second = [segment(2, 5, 13, seed=3), segment(1, 5, 13, (0, 0), seed=4)]
    found = head_delta([first, second], SUMMED, backend="triton")
    close(found, stored_oracle([first, second]))
    close(found, plain.head_delta([first, second], SUMMED))


def test_transposed_views_are_read_in_their_own_order():
    base, task = pair((1, 24, 24))
    blocks = [rearrange(side[0], "m (head d) -> head d m", head=3) for side in (base, task)]  # of a Conv1D weight
    layer = [Segment(*blocks, (0, 1, 2))]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


def test_models_of_two_dtypes():
    base, _ = pair((2, 8, 32))
    layer = [Segment(base, (base + 1e-2 * torch.randn_like(base)).bfloat16(), (0, 1))]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


@pytest.mark.parametrize("tau", [0.05, 1.0, 20.0])
def test_temperature(tau):
    layer = [segment(1, 16, 64, delta=1e-2)]
    close(head_delta([layer], SUMMED, temperature=tau, backend="triton"), stored_oracle([layer], tau))


def test_a_weight_far_from_its_base():
    base, task = pair((2, 8, 40))
    task[1, 3, 7] += 20.0
    layer = [Segment(base, task, (0, 1))]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


def test_identical_models_score_exactly_zero():
    base, _ = pair((2, 8, 40))
    found = head_delta([[Segment(base, base.clone(), (0, 1))]], METRICS, backend="triton")
    assert all((values == 0).all() for values in found.values())


def test_runs_are_equal_to_the_bit():
    layer = [segment(2, 8, 100), segment(2, 8, 32, seed=1)]
    first, second = (head_delta([layer], SUMMED, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in SUMMED)


@pytest.mark.parametrize("score", [head_delta, head_delta_projection])
@pytest.mark.parametrize("which", ["base", "task"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_unsound_weights_are_refused_by_head(which, value, score):
    base, task = pair((3, 16, 40))
    (base if which == "base" else task)[2, 1, 1] = value
    first, second = segment(2, 16, 40), segment(3, 16, 40)
    with pytest.raises(ValueError, match="head 2 of layer 1"):
        score([(first, first, first), (Segment(base, task, (0, 1, 2)), second, second)], ["pad"], backend="triton")


def test_nothing_outside_the_views_is_read():
    frame = torch.full((2, 10, 70), torch.nan)
    base, task = pair((2, 8, 40))
    views = []
    for side in (base, task):
        room = frame.clone()
        room[:, 1:9, 15:55] = side
        views.append(room[:, 1:9, 15:55])
    found = head_delta([[Segment(*views, (0, 1))]], SUMMED, backend="triton")
    close(found, stored_oracle([[Segment(base, task, (0, 1))]]))


def test_each_model_has_strides_of_its_own():
    base, task = pair((2, 8, 40))
    wide = torch.full((2, 8, 50), torch.nan)
    wide[:, :, 5:45] = task
    found = head_delta([[Segment(base, wide[:, :, 5:45], (0, 1))]], SUMMED, backend="triton")
    close(found, stored_oracle([[Segment(base, task, (0, 1))]]))


def test_the_oracle_itself_sees_an_order():
    base, task = pair((1, 8, 40))
    flipped = oracle(base.flip(2).flatten(), task.flip(2).flatten())
    assert abs(flipped["pad"] / oracle(base.flatten(), task.flatten())["pad"] - 1) > 1e-3


@pytest.mark.parametrize("x", [0.5, 2.0, 6.0, 7.9])
def test_a_dominating_weight_that_moves(x, height=14.0, metrics=SUMMED):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 16, 100, generator=generator)
    base[0, 8, 50] = height
    task = base + 1e-3 * torch.randn(base.shape, generator=generator)
    task[0, 8, 50] = base[0, 8, 50] - x
    layer = [Segment(base, task, (0,))]
    close(head_delta([layer], metrics, backend="triton"), stored_oracle([layer]), metrics)


def test_dominating_weights_that_move_together():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 16, 100, generator=generator)
    base[0, ::2, ::10] = 14.0
    task = base + 1e-3 * torch.randn(base.shape, generator=generator)
    task[0, ::2, ::10] -= 7.9
    layer = [Segment(base, task, (0,))]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


@pytest.mark.parametrize("scale, tau", [(0.05, 0.003), (1.0, 0.1), (30.0, 1.0), (1e4, 1000.0)])
def test_concentrated_softmax(scale, tau):
    generator = torch.Generator().manual_seed(1)
    base = scale * torch.randn(1, 16, 200, generator=generator)
    layer = [Segment(base, base + 1e-3 * scale * torch.randn(base.shape, generator=generator), (0,))]
    close(head_delta([layer], SUMMED, temperature=tau, backend="triton"), stored_oracle([layer], tau))


@pytest.mark.parametrize("noise", [1e-5, 1e-6, 1e-7])
def test_cosine_of_weights_that_shrink(noise):
    generator = torch.Generator().manual_seed(2)
    base = 0.05 * torch.randn(1, 16, 200, generator=generator)
    layer = [Segment(base, 0.999 * base + noise * torch.randn(base.shape, generator=generator), (0,))]
    close(head_delta([layer], SUMMED, backend="triton"), stored_oracle([layer]))


@pytest.mark.parametrize("offset", [-300.0, -95.0, -20.0, 20.0, 80.0, 300.0])
def test_logits_out_of_range(offset):
    generator = torch.Generator().manual_seed(3)
    base = offset + 0.05 * torch.randn(1, 16, 40, generator=generator)
    layer = [Segment(base, base + 1e-2 * torch.randn(base.shape, generator=generator), (0,))]
    metrics = [name for name in SUMMED if name != "cosine_weights"]
    close(head_delta([layer], metrics, backend="triton"), stored_oracle([layer]), metrics)


def test_a_temperature_beyond_float32():
    layer = [Segment(torch.zeros(1, 16, 40), torch.zeros(1, 16, 40), (0,))]
    found = head_delta([layer], SUMMED, temperature=1e-15, backend="triton")
    assert all((values == 0).all() for values in found.values())


@pytest.mark.parametrize("name", SUMMED)
def test_a_metric_alone_is_what_it_is_among_all(name):
    layer = [segment(2, 8, 40)]
    alone, among = (head_delta([layer], names, backend="triton")[name] for names in ([name], SUMMED))
    # compiled, the variants of a kernel round their sums differently
    torch.testing.assert_close(alone, among, rtol=2e-7, atol=0)
