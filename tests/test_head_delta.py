"""What `head_delta` means: the reference against long doubles, the released definition, seeded faults."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from alps_kernels.ops import reference_scoring
from alps_kernels.ops.head_delta import METRICS, Segment, head_delta, head_delta_projection
from tests.delta_oracle import projection_oracle, stored_oracle
from tests.mutants import plant

TOLERANCE = 1e-6  # relative, every metric (DESIGN: 1.5e-5 at the least)


def segment(n, rows, cols, index=None, delta=1e-3, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = (0.05 * torch.randn(n, rows, cols, generator=generator)).to(dtype)
    task = (base.float() + delta * torch.randn(base.shape, generator=generator)).to(dtype)
    return Segment(base, task, tuple(index if index is not None else range(n)))


def close(found, expected, tolerance=TOLERANCE, metrics=METRICS):
    for name in metrics:
        error = ((found[name] - expected[name]).abs() / expected[name].abs().clamp(min=1e-300)).max()
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, cols", [(64, 576), (3 * 64, 576)])
def test_every_metric_is_exact(rows, cols, dtype, delta):
    layer = [segment(2, rows, cols, dtype=dtype, delta=delta)]
    close(head_delta([layer], METRICS), stored_oracle([layer]))


@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_the_largest_head_is_exact(delta):
    layer = [segment(1, 3 * 128, 4096, delta=delta)]
    close(head_delta([layer], ["pad", "kl"]), stored_oracle([layer]), metrics=["pad", "kl"])


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_exact(dtype, delta):
    group = (0, 0, 1)
    layer = (segment(3, 32, 96, delta=delta, dtype=dtype), segment(2, 32, 96, group, delta, dtype, 1),
             segment(2, 24, 96, group, delta, dtype, 2))
    close(head_delta_projection([layer], METRICS), projection_oracle([layer]))


@pytest.mark.parametrize("tau", [0.01, 0.5, 30.0])
def test_temperature(tau):
    layer = [segment(2, 16, 50, delta=1e-3)]
    close(head_delta([layer], METRICS, temperature=tau), stored_oracle([layer], tau))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_concentrated_softmax(scale):
    base = scale * torch.randn(2, 16, 50, generator=torch.Generator().manual_seed(1))
    layer = [Segment(base, base + 0.1 * torch.randn_like(base), (0, 1))]
    found, expected = head_delta([layer], METRICS), stored_oracle([layer])
    for name in METRICS:  # probabilities of 1e-300 leave float64's range before long double's
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-15, msg=name)


@pytest.mark.parametrize("x", [0.5, 0.99, 1.01, 4.0, 6.0, 7.9])
def test_a_dominating_weight_that_moves(x):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 16, 100, generator=generator)
    base[0, 8, 50] = 14.0
    task = base + 1e-3 * torch.randn(base.shape, generator=generator)
    task[0, 8, 50] = base[0, 8, 50] - x
    close(head_delta([[Segment(base, task, (0,))]], METRICS), stored_oracle([[Segment(base, task, (0,))]]))


def test_a_weight_far_from_its_base():
    base = 0.05 * torch.randn(2, 16, 50)
    task = base + 1e-4 * torch.randn_like(base)
    base[1, 3, 3], task[1, 3, 3] = -60.0, -51.0
    task[0, 1, 1] += 25.0
    close(head_delta([[Segment(base, task, (0, 1))]], METRICS), stored_oracle([[Segment(base, task, (0, 1))]]))


def test_pad_is_the_released_definition():
    layer = [segment(2, 24, 40, delta=1e-2), segment(1, 24, 40, (0, 0), delta=1e-2, seed=1)]
    found = head_delta([layer], ["pad", "pad_index"])
    for h in range(2):
        p, q = (torch.softmax(torch.cat([getattr(s, side)[s.index[h]].flatten() for s in layer]).double(), 0).numpy()
                for side in ("base", "task"))
        for name, positions in (("pad", np.arange(len(p)) / (len(p) - 1)), ("pad_index", np.arange(len(p)))):
            assert float(found[name][h]) == pytest.approx(wasserstein_distance(positions, positions, p, q), rel=1e-6)


def test_stretches_of_columns_join(monkeypatch):
    layer = [segment(2, 8, 100), segment(2, 8, 33, seed=1)]
    whole = head_delta([layer], METRICS)
    monkeypatch.setattr(reference_scoring, "ELEMENTS", 100)
    close(head_delta([layer], METRICS), whole, tolerance=1e-9)


def test_segments_of_several_dtypes():
    single, double = segment(1, 4, 10, delta=1e-9), segment(1, 4, 10, dtype=torch.float64, delta=1e-9)
    for layer in ([single, double], [double, single]):
        close(head_delta([layer], ["euclidean"]), stored_oracle([layer]), metrics=["euclidean"])


def test_the_weights_are_left_alone():
    layer = [segment(3, 8, 40)]
    before = [side.clone() for side in (layer[0].base, layer[0].task)]
    head_delta([layer], METRICS)
    head_delta_projection([(layer[0], layer[0], layer[0])], METRICS)
    assert all(torch.equal(a, b) for a, b in zip(before, (layer[0].base, layer[0].task), strict=True))


def test_degenerate_heads():
    zero, one = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    found = head_delta([[Segment(zero, zero.clone(), (0,))], [Segment(zero, one, (0,))], [Segment(one, 2 * one, (0,))]], METRICS)
    assert found["relative"].tolist() == [0.0, float("inf"), 1.0]
    assert found["cosine_weights"].tolist() == [0.0, 1.0, 0.0]
    assert found["pad"].abs().max() < 1e-7  # a constant added to every weight moves no probability
    single = head_delta([[Segment(one[:, :1, :1], 2 * one[:, :1, :1], (0,))]], METRICS)
    assert single["pad"].item() == 0 and single["pad_index"].item() == 0 and single["euclidean"].item() == 1


def test_identical_heads_score_exactly_zero():
    base = torch.randn(2, 8, 40)
    found = head_delta([[Segment(base, base.clone(), (0, 1))]], METRICS)
    assert all((values == 0).all() for values in found.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("both", [False, True])
def test_unsound_weights_are_refused_by_head(value, both):
    base, task = torch.randn(2, 3, 8, 40)
    task[2, 1, 1] = value
    if both:
        base[2, 1, 1] = value
    layers = [[segment(1, 8, 40)], [Segment(base, task, (0, 1, 2))]]
    with pytest.raises(ValueError, match="head 2 of layer 1"):
        head_delta(layers, ["pad"])
    with pytest.raises(ValueError, match="head 2 of layer 1"):
        head_delta_projection([tuple(layers[0] * 3), tuple(layers[1] * 3)], ["pad"])


@pytest.mark.parametrize("layers, metrics, tau, message", [
    ([[segment(1, 2, 2)]], ["pads"], 1.0, "'pads'"), ([[segment(1, 2, 2)]], ["pad"], 0.0, "temperature"),
    ([[segment(1, 2, 2)]], ["pad"], float("nan"), "temperature"), ([[]], ["pad"], 1.0, "layer 0"),
    ([[segment(1, 2, 2), segment(2, 2, 2)]], ["pad"], 1.0, "layer 0"),
    ([[segment(1, 2, 2, (1,))]], ["pad"], 1.0, "matrix 1 of 1"), ([[segment(1, 2, 2, (-1,))]], ["pad"], 1.0, "matrix -1"),
    ([[Segment(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), (0,))]], ["pad"], 1.0, r"\[1, 2, 3\]"),
    ([[Segment(torch.zeros(1, 2, 2).int(), torch.zeros(1, 2, 2).int(), (0,))]], ["pad"], 1.0, "int32")])
def test_bad_arguments_are_named(layers, metrics, tau, message):
    with pytest.raises(ValueError, match=message):
        head_delta(layers, metrics, temperature=tau)


def test_projections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not multiply"):
        head_delta_projection([(segment(1, 4, 8), segment(1, 5, 8), segment(1, 4, 8))], ["pad"])


# -- faults planted in what the scores mean, each with the check that sees it -----------------

EXACT = [lambda: test_every_metric_is_exact(64, 576, torch.float32, 1e-3)]
PROJECTED = [lambda: test_projection_is_exact(torch.float32, 1e-3)]
FAULTS = {
    "r is added": ("addcmul_(weight, r, value=-1)", "addcmul_(weight, r, value=1)", EXACT),
    "probabilities of the base's sum": ("z_task = shift / z_base, z_base + shift", "z_task = shift / z_base, z_base", EXACT),
    "a wrong term of the KL series": ("(30, 20, 12, 6, 2)", "(30, 20, 12, 7, 2)", EXACT),
    "half of Jensen-Shannon": ("0.5 * _surprise(d) - _surprise(0.5 * d)", "0.5 * _surprise(d)", EXACT),
    "the cosine of what is not across": ("/ squares, 0.0)[:, None] * a", "/ squares, 0.0)[:, None] * 0", EXACT),
    "sorted alone": ("moved = (base.double() + delta.double()).sort(1).values", "moved = (base.double() + delta.double())", EXACT),
    "every stretch starts anew": ("            d[:, :1] += carry\n", "", [lambda: test_the_largest_head_is_exact(1e-2)]),
    "change of v is left out": (" + k_base @ (v_task - v_base).mT", "", PROJECTED),
    "change of q meets the base's k and v": ("(q_task - q_base) @ m_task", "(q_task - q_base) @ m_base", PROJECTED),
    "the first group for all": ("groupby(range(len(q.index)), key=lambda h: (k.index[h], v.index[h]))",
                                "groupby(range(len(q.index)), key=lambda h: (k.index[0], v.index[0]))", PROJECTED),
    "temperature is ignored": ("        delta.div_(tau)\n", "", [lambda: test_temperature(0.5)]),
    "weights far away are subtracted": ("d = torch.where(near, p * ratio, q - p)", "d = p * ratio", [test_a_weight_far_from_its_base]),
    "infinities pass": ("base.amax(1).isfinite() & largest.isfinite()", "base.amax(1) == base.amax(1)",
                        [lambda: test_unsound_weights_are_refused_by_head(float("inf"), False)]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch):
    old, new, checks = FAULTS[name]
    plant(monkeypatch, reference_scoring, (old, new))
    for check in checks:
        with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
            check()
