"""The CPU backend against long doubles, the oracle and the released definition; seeded faults."""

import gc
import importlib
import time
import weakref

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import cpu, large_changes, oracle, small_changes, tables, workers
from tests.ops.delta_cases import segment
from tests.ops.delta_oracle import projection_oracle, stored_oracle
from tests.support.mutants import plant

TOLERANCE = 1e-6  # relative, every metric


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


def test_heads_that_share_matrices():
    layer = [segment(5, 16, 40), segment(3, 16, 40, (0, 0, 1, 1, 2), seed=1), segment(4, 8, 40, (3, 0, 0, 2, 1), seed=2)]
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


@pytest.mark.parametrize("delta", [1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["head_delta", "head_delta_projection"])
def test_both_oracles_and_the_cpu_backend_agree(name, dtype, delta):
    group = (0, 0, 1)
    layer = (segment(3, 32, 96, delta=delta, dtype=dtype), segment(2, 32, 96, group, delta, dtype, 1),
             segment(2, 24, 96, group, delta, dtype, 2))
    plain = getattr(oracle, name)([layer, layer], METRICS)
    close(plain, {"head_delta": stored_oracle, "head_delta_projection": projection_oracle}[name]([layer, layer]))
    close(getattr(cpu, name)([layer, layer], METRICS), plain)


def test_kernels_and_host_name_the_same_columns():
    heads, sums = (importlib.import_module(f"csrc_triton.{file}") for file in ("delta_heads", "delta_sums"))
    assert heads.SUM_FIELDS.value == len(tables.SumRow._fields) and heads.KIND_FIELDS.value == len(tables.KindRow._fields)
    assert sums.STAT_FIELDS.value == tables.STATS and heads.SUM_FIELDS.value % 2 == 0  # rows begin at 16 bytes
    named = {name[4:].lower(): constant.value for name, constant in vars(heads).items()
             if name.startswith("SUM_") and name != "SUM_FIELDS"}
    assert named == {name: tables.SumRow._fields.index(name) for name in ("r", "top", "far", "listed")}
    # In the order in which `list_tiles_kernel` and, up to cc, pass B add to them; those of kinds as it loads them.
    assert tables.SumRow._fields[:10] == ("steps", "kl", "js", "aa", "ac", "cc", "z", "dd", "bb", "bd")
    assert tables.KindRow._fields == ("first", "tiles", "tiles_of_run", "run", "tile")


@pytest.mark.parametrize("score, parts", [(head_delta, 1), (head_delta_projection, 3)])
def test_scored_weights_are_let_go_of_at_once(score, parts):
    """Without a collection: a checkpoint's layers would pile up until one comes (1.5 GiB of an 8B pair, once)."""
    layer = tuple(segment(2, 32, 96, seed=seed) for seed in range(parts))
    kept = [weakref.ref(part.base) for part in layer]
    gc.disable()
    try:
        score([layer], METRICS)
        del layer
        assert [ref() for ref in kept] == [None] * parts
    finally:
        gc.enable()


@pytest.mark.parametrize("tau", [0.01, 0.5, 30.0])
def test_temperature(tau):
    layer = [segment(2, 16, 50, delta=1e-3)]
    close(head_delta([layer], METRICS, temperature=tau), stored_oracle([layer], tau))


@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0, 1e4])
def test_concentrated_softmax(scale):
    base, noise = torch.randn(2, 40, 16, 50, generator=torch.Generator().manual_seed(1))
    layer = [Segment(scale * base, scale * base + 0.05 * noise.clamp(-3, 3), tuple(range(40)))]
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


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-9])
def test_float64_is_exact(delta):
    layer = [segment(2, 16, 100, dtype=torch.float64)]
    layer[0].task.copy_(layer[0].base + delta * torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    # Of the smallest change's divergences the oracle itself, which subtracts, has few digits.
    metrics = [name for name in METRICS if delta > 1e-8 or name not in ("kl", "js")]
    close(head_delta([layer], metrics), stored_oracle([layer]), metrics=metrics)


def test_weights_that_shrink():
    base, noise = (x * torch.randn(2, 20, 200, generator=torch.Generator().manual_seed(7)) for x in (0.03, 1e-6))
    layer = [Segment(base, 0.99 * base + noise.flip(2), (0, 1))]
    close(head_delta([layer], METRICS), stored_oracle([layer]))


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
    monkeypatch.setattr(cpu, "ELEMENTS", 100)
    monkeypatch.setattr(cpu, "exact", None)  # not by way of float64
    close(head_delta([layer], METRICS), stored_oracle([layer]))


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
    ([[Segment(torch.zeros(1, 2, 2).int(), torch.zeros(1, 2, 2).int(), (0,))]], ["pad"], 1.0, "int32"),
    # a kernel of one device that reads addresses of another kills the process's CUDA context
    ([[segment(1, 2, 2), Segment(*torch.zeros(2, 1, 2, 2, device="meta"), (0,))]], ["pad"], 1.0,
     "layer 0: its weights are on cpu and meta; expected one device"),
    ([[Segment(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, device="meta"), (0,))]], ["pad"], 1.0, "cpu and meta")])
def test_bad_arguments_are_named(layers, metrics, tau, message):
    with pytest.raises(ValueError, match=message):
        head_delta(layers, metrics, temperature=tau)


def test_projections_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not multiply"):
        head_delta_projection([(segment(1, 4, 8), segment(1, 5, 8), segment(1, 4, 8))], ["pad"])


@pytest.mark.parametrize("change, exactly", [
    (lambda base, noise: base + 0.1 + 1e-4 * noise, True),  # nearly all of it a shift, which moves no probability
    (lambda base, noise: base + 1e-3 + 1e-3 * noise, False), (lambda base, noise: base + 1e-2 * noise**2, False),
    (lambda base, noise: base + 1e-4 * noise**5, False), (lambda base, noise: base + 0.05 * noise.clamp(-3, 3), False),
    (lambda base, noise: base + 0.2 * noise.sign(), False), (lambda base, noise: base + 0.1 * noise.clamp(-3, 3), True),
    (lambda base, noise: 0.99 * base + 1e-5 * noise, False),
    (lambda base, noise: torch.where(noise > 2.5, base + 1e-3, base), False)])
def test_changes_of_other_kinds(change, exactly, monkeypatch):
    seen, exact = [], cpu.exact
    monkeypatch.setattr(cpu, "exact", lambda *a: seen.append(len(seen)) or exact(*a))
    base, noise = (x * torch.randn(2, 20, 200, generator=torch.Generator().manual_seed(7)) for x in (0.03, 1.0))
    layer = [Segment(base, change(base, noise.flip(2)), (0, 1))]
    metrics = [name for name in METRICS if name != "cosine_weights"]
    close(head_delta([layer], metrics), stored_oracle([layer]), metrics=metrics)
    assert bool(seen) == exactly


def test_logits_of_two_spreads_whose_mean_moves():
    # Of x and its mean, float32 leaves a rest; it is spread as G is, and G lies half as dense in one half.
    generator = torch.Generator().manual_seed(1)
    base = torch.cat([torch.randn(3, 1, 20000, generator=generator), 0.01 * torch.randn(3, 1, 20000, generator=generator)], 2)
    base = base.bfloat16()
    task = base.float() + 1e-3 + 1e-4 * torch.randn(base.shape, generator=generator)
    layer = [Segment(base, task, (0, 1, 2))]
    close(head_delta([layer], ["pad"]), stored_oracle([layer]), metrics=["pad"])


@pytest.mark.parametrize("score", [head_delta, head_delta_projection])
def test_threads_share_the_heads(score, monkeypatch):
    monkeypatch.setattr(cpu, "JOB", 2**13)  # one or two heads
    group = (0, 0, 1, 1, 2)
    layer = (segment(5, 16, 300), segment(3, 16, 300, group, seed=1), segment(3, 16, 300, group, seed=2))
    layer[0].base.requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            found.append(score([layer, layer], METRICS))
            assert torch.get_num_threads() == count
        layer[0].task[4, 3, 3] = torch.nan
        with pytest.raises(ValueError, match="head 4 of layer 1"):
            score([(segment(1, 2, 3),) * 3, layer], ["pad"])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], again[name]) for again in found[1:] for name in METRICS)


def test_one_operator_gets_the_threads_of_few_workers(monkeypatch):
    monkeypatch.setattr(workers, "MOST", 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        with workers.workers(torch.device("cpu")) as at_work:
            assert list(at_work.spread(lambda _: torch.get_num_threads(), range(4))) == [2] * 4
    finally:
        torch.set_num_threads(threads)


def test_the_first_job_that_fails_raises():
    def work(i):
        time.sleep(0.02 if i == 2 else 0)  # job 3 fails before it
        if i in (2, 3):
            raise ValueError(f"job {i}")
        return i

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with workers.workers(torch.device("cpu")) as at_work:
            assert at_work.spread(lambda i: i * i, range(50)) == [i * i for i in range(50)]
            with pytest.raises(ValueError, match="job 2"):
                at_work.spread(work, range(50))
            assert at_work.spread(work, []) == []
    finally:
        torch.set_num_threads(threads)


# -- faults planted in what the scores mean, each with the check that sees it -----------------

def patched(check, *arguments):
    with pytest.MonkeyPatch.context() as monkeypatch:
        check(*arguments, monkeypatch)


EXACT = [lambda: test_every_metric_is_exact(64, 576, torch.float32, 1e-2)]
FAR = [test_a_weight_far_from_its_base]
kinds = lambda change, exactly: patched(test_changes_of_other_kinds, change, exactly)  # noqa: E731
SHIFTED = [lambda: kinds(lambda b, e: b + 1e-3 + 1e-3 * e, False)]
WIDE = [lambda: kinds(lambda b, e: b + 0.05 * e.clamp(-3, 3), False)]
PROJECTED = [lambda: test_projection_is_exact(torch.float32, 1e-3)]
SHARED = [test_heads_that_share_matrices]
JOINED = [lambda: patched(test_stretches_of_columns_join)]
FAULTS = {
    # the passes over heads that moved little
    "the growth of Z is left in": (small_changes, "y.sub_(growth)", "y", SHIFTED),
    "half of the growth": (small_changes, "2 * torch.atanh", "torch.atanh", SHIFTED),
    "sinh by the series of cosh": (small_changes, "_times(y, w, SINH, most, spare, d)", "_times(y, w, COSH, most, spare, d)", WIDE),
    "a series stops at its first term": (small_changes, "factors[:kept[-1]]", "factors[:1]",
                                         [lambda: kinds(lambda b, e: b + 0.2 * e.sign(), False)]),
    "the series of KL's odd part for JS": (small_changes, "product, w, JS", "product, w, ODD", WIDE),
    "KL without its odd part": (small_changes, '(s["even"] / 2 + s["odd"] / 12)', '(s["even"] / 2)', EXACT),
    "JS of KL": (small_changes, 's["js"] / 8', 's["js"] / 2', EXACT),
    "what rounding left stays": (small_changes, "self.end / -n", "self.end * 0", SHIFTED),
    "the base in the middle": (small_changes, 's["cd"] - s["ddp"] / 2', 's["cd"]', EXACT),
    "exp of the base alone": (small_changes, "weight.add_(x, alpha=LOG2E / 2).exp2_()", "weight.exp2_()", EXACT),
    "every stretch starts anew": (small_changes, "                d[:, :1] += self.end\n", "", JOINED),
    "temperature is ignored": (small_changes, "            if self.tau != 1:\n                x.div_(self.tau)\n", "",
                               [lambda: test_temperature(0.5)]),
    "a rest of any size is taken off in a line": (small_changes, 's["rest"] <=', '0 * s["rest"] <=', [test_logits_of_two_spreads_whose_mean_moves]),
    "far heads pass as near ones": (small_changes, '& (s["far"] <= FAR) ', "", [lambda: kinds(lambda b, e: b + 0.1 * e.clamp(-3, 3), True)]),
    "concentrated heads pass": (small_changes, "norm >= CONCENTRATED", "norm >= 0", [lambda: test_concentrated_softmax(4.0)]),
    "cancelled sums pass": (small_changes, ">= CANCELLED * s[d] * s[a]", ">= -1.0", [test_weights_that_shrink]),
    # how heads are read
    "a segment is read from its start": (cpu, "base[:, first - start:last - start], task",
                                         "base[:, :last - first], task", JOINED),
    "a stored matrix of the first group for all": (cpu, "rearrange(blocks[i:i + 1],", "rearrange(blocks[:1],", SHARED),
    "one head of those that share a matrix": (cpu, "expand(len([*same]), -1)", "expand(1, -1)", SHARED),
    "change of v is left out": (cpu, " + k_base @ (v_task - v_base).mT", "", PROJECTED),
    "change of q meets the base's k and v": (cpu, "q_task - q_base, m_task,", "q_task - q_base, m_base,", PROJECTED),
    "the first group for all": (cpu, "self.products[self.pairs[h]]", "self.products[self.pairs[0]]", PROJECTED),
    "sorted alone": (large_changes, "(base.double() + delta.double()).sort(1).values", "(base.double() + delta.double())", EXACT),
    # heads that moved far
    "weights far away are subtracted": (large_changes, "d = torch.where(near_base, p * ratio, q - p)", "d = p * ratio", FAR),
    "a wrong term of the KL series": (large_changes, "(30, 20, 12, 6, 2)", "(30, 20, 12, 7, 2)",
                                      [lambda: test_float64_is_exact(1e-3)]),
    "half of Jensen-Shannon": (large_changes, "0.5 * _surprise(ratio) - _surprise(0.5 * ratio)", "0.5 * _surprise(ratio)",
                               [lambda: test_float64_is_exact(1e-3)]),
    "the cosine of what is not across": (large_changes, "/ squares, 0.0)[:, None] * a", "/ squares, 0.0)[:, None] * 0",
                                         [test_weights_that_shrink]),
    "the rounding of Z stays": (large_changes, "d -= p * d.sum(1, keepdim=True)", "pass",
                                [lambda: test_float64_is_exact(1e-9), lambda: test_concentrated_softmax(30.0)]),
    "infinities pass": (cpu, "(base.isfinite().all() and delta.isfinite().all())", "(base == base).all()",
                        [lambda: test_unsound_weights_are_refused_by_head(float("inf"), False)]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, monkeypatch):
    module, old, new, checks = FAULTS[name]
    plant(monkeypatch, module, (old, new))
    for check in checks:
        with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
            check()


# A head of 10,000 elements whose sums the kernels are trusted with, and what makes them doubtful for which metrics.
TRUSTED = {"steps": 1e3, "kl": 1.0, "js": 0.2, "aa": 1e4, "ac": 1.0, "cc": 1.0, "z": 1e4, "dd": 1.0, "bb": 4.0, "bd": 0.1,
           "r": 1e-3, "top": 16.0, "far": 1e-2, "listed": 3.0}
SOFTMAX = {"pad", "pad_index", "kl", "js", "cosine"}


@pytest.mark.parametrize("changes, metrics", [
    ({}, set()), ({"dd": float("inf")}, set(METRICS) - {"pad_values"}), ({"dd": float("nan")}, set(METRICS) - {"pad_values"}),
    ({"dd": 1e-33}, set(METRICS) - {"pad_values"}), ({"dd": 0.0, "bd": 0.0, "r": 0.0, "steps": 0.0}, set()),
    ({"bb": float("inf")}, {"relative", "cosine_weights"}), ({"bb": 1e-33}, {"relative", "cosine_weights"}),
    ({"bb": 0.0, "bd": 0.0}, set()), ({"far": 1.1}, SOFTMAX), ({"top": 2e3}, SOFTMAX), ({"z": 1e13, "top": 5e9}, SOFTMAX),
    ({"z": 1e-6, "top": 1e-10, "steps": 1e-7}, SOFTMAX), ({"z": float("nan")}, SOFTMAX), ({"r": float("inf")}, SOFTMAX),
    ({"r": 9e-3}, {"pad", "pad_index"}), ({"r": -9e-3}, {"pad", "pad_index"}), ({"dd": 11.0}, {"pad", "pad_index"}),
    ({"ac": 99.0}, {"cosine"}), ({"bd": 1.99}, {"cosine_weights"})])
def test_which_sums_are_doubtful(changes, metrics):
    row = [(TRUSTED | changes).get(name, 0.0) for name in tables.SumRow._fields]
    sums = tables.Sums(torch.tensor([row], dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64), 1.0)
    assert {name for name in METRICS if name != "pad_values" and sums.doubtful([name]).item()} == metrics


def test_the_common_change_is_measured_in_temperatures():
    row = torch.tensor([[TRUSTED.get(name, 0.0) for name in tables.SumRow._fields]], dtype=torch.float64)
    size = torch.tensor([1e4], dtype=torch.float64)
    assert [tables.Sums(row, size, inv_tau).doubtful(["pad"]).item() for inv_tau in (1.0, 4.0)] == [False, True]
