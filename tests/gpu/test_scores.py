"""Scores on a GPU: against the definitions in extended precision, and the public function on two models.

Skipped without CUDA; see cases.py. `sanitizer` in a name: small enough for compute-sanitizer.
"""

import copy

import pytest
import torch

import alps_kernels as alps
from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from tests.gpu import cases
from tests.ops.delta_oracle import projection_oracle, stored_oracle
from tests.slicing.cases import tiny

pytestmark = cases.MARKS
SUMMED = [m for m in METRICS if m not in ("pad_values", "cosine_weights")]
NEAR = {"rtol": 1.5e-5, "atol": 0}


def layer_of(dtype, sizes, d_model, index, delta=1e-2, scale=0.05):
    """(base, task, index) of q, k and v on the CPU; sizes: rows of q, k, v."""
    layer = []
    for seed, (rows, heads) in enumerate(zip(sizes, (index[0], *(index[1],) * 2), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        base = (scale * torch.randn(max(heads) + 1, rows, d_model, generator=generator)).to(dtype)
        task = (base.float() + delta * torch.randn(base.shape, generator=generator)).to(dtype)
        layer.append((base, task, heads))
    return layer


def both(layer):
    """The layer on the device, and on the CPU."""
    return (tuple(Segment(b.to(cases.DEVICE), t.to(cases.DEVICE), i) for b, t, i in layer),
            tuple(Segment(*entry) for entry in layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_the_oracle_sanitizer(dtype):
    there, here = both(layer_of(dtype, (64, 64, 64), 96, ((0, 1, 2, 3), (0, 0, 1, 1))))
    metrics = [m for m in METRICS if m != "cosine_weights"]
    for found, expected in ((head_delta([there], metrics), stored_oracle([here])),
                            (head_delta_projection([there], metrics), projection_oracle([here]))):
        for name in metrics:
            torch.testing.assert_close(found[name], expected[name], msg=name, **NEAR)


# The largest head size, v of another size than q and k, sizes and widths that are multiples of nothing.
@pytest.mark.parametrize("d_k, d_v, d_model", [(256, 256, 190), (64, 96, 131), (20, 20, 57)])
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_of_odd_shapes_and_temperatures_equals_the_oracle(dtype, tau, d_k, d_v, d_model):
    there, here = both(layer_of(dtype, (d_k, d_k, d_v), d_model, ((0, 1, 2, 3), (0, 0, 1, 1))))
    found, expected = head_delta_projection([there], SUMMED, temperature=tau), projection_oracle([here], tau)
    for name in SUMMED:
        torch.testing.assert_close(found[name], expected[name], msg=f"{name} at temperature {tau}", **NEAR)


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_weights_at_every_temperature_equal_the_oracle(dtype, tau):
    there, here = both(layer_of(dtype, (20, 20, 20), 131, ((0, 1, 2, 3), (0, 0, 1, 1))))
    found, expected = head_delta([there], SUMMED, temperature=tau), stored_oracle([here], tau)
    for name in SUMMED:
        torch.testing.assert_close(found[name], expected[name], msg=f"{name} at temperature {tau}", **NEAR)


@pytest.mark.parametrize("delta", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_an_8b_model_score_as_the_cpu_backend_does(dtype, delta):
    generator = torch.Generator(cases.DEVICE).manual_seed(0)
    layer = []
    for n, index in ((4, (0, 1, 2, 3)), (1, (0,) * 4), (1, (0,) * 4)):
        base = (0.02 * torch.randn(n, 128, 4096, generator=generator, device=cases.DEVICE)).to(dtype)
        task = (base.float() + delta * torch.randn(base.shape, generator=generator, device=cases.DEVICE)).to(dtype)
        layer.append(Segment(base, task, index))
    for score in (head_delta, head_delta_projection):
        found = score([tuple(layer)], SUMMED)
        # float64 weights go to the CPU backend, which then computes in float64 throughout.
        wide = tuple(Segment(s.base.double(), s.task.double(), s.index) for s in layer)
        for name, expected in score([wide], SUMMED).items():
            torch.testing.assert_close(found[name], expected, msg=f"{score.__name__} {name}", **NEAR)


def test_scores_are_equal_to_the_bit_from_run_to_run():
    base = 0.02 * torch.randn(32, 128, 4096, device=cases.DEVICE)
    layer = [Segment(base.bfloat16(), (base + 1e-3 * torch.randn_like(base)).bfloat16(), tuple(range(32)))]
    metrics = [m for m in METRICS if m != "pad_values"]
    first, second = head_delta([layer], metrics), head_delta([layer], metrics)
    assert all(torch.equal(first[name], second[name]) for name in metrics)


def models(model_type="llama", dtype=torch.float32):
    base = tiny(model_type, dtype=dtype)
    task = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in task.parameters():
            param += (1e-2 * torch.randn(param.shape, generator=generator)).to(param)
    return base, task


def in_float64(base, task, **options):
    """The CPU's answer in float64, of the same weights."""
    return alps.score_heads(copy.deepcopy(base).double(), copy.deepcopy(task).double(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("representation", ["projection", "qkv", "qkvo"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_score_heads_on_two_models_is_the_cpu_s_in_float64_sanitizer(representation, dtype, tau):
    base, task = models(dtype=dtype)
    options = {"representation": representation, "temperature": tau, "metric": SUMMED}
    expected = in_float64(base, task, **options)
    found = alps.score_heads(base.to(cases.DEVICE), task.to(cases.DEVICE), **options)
    for name in SUMMED:
        torch.testing.assert_close(found[name].tensor, expected[name].tensor, msg=name, **NEAR)
        assert found[name].heads == expected[name].heads


def test_score_heads_with_its_defaults_ranks_as_the_cpu_does():
    base, task = models()
    expected = in_float64(base, task)
    elsewhere = alps.score_heads(base, task, device=cases.DEVICE)  # models in the CPU's memory
    found = alps.score_heads(base.to(cases.DEVICE), task.to(cases.DEVICE))
    for scores in (found, elsewhere):
        torch.testing.assert_close(scores.tensor, expected.tensor, **NEAR)
        assert list(scores.top(0.25)) == list(expected.top(0.25))


@pytest.mark.parametrize("representation", ["projection", "qkv"])
def test_transposed_projections_of_gpt2_score_as_on_the_cpu(representation):
    base, task = models("gpt2")
    expected = in_float64(base, task, representation=representation)
    found = alps.score_heads(base.to(cases.DEVICE), task.to(cases.DEVICE), representation=representation)
    torch.testing.assert_close(found.tensor, expected.tensor, **NEAR)
