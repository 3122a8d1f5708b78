"""8-bit moments on a GPU: each step against the CPU backend from the same state. Skipped without CUDA; see cases.py.

A GPU's division and square root may differ from the CPU's in the last bit, so that a moment which lies next to the
border between two codes may get the other one. What one flipped code may do: its moment is stored one code off. The
parameter of that step is computed before the moments are rounded, and is not off at all; later steps start from
the stored moment. So both sides start every step from one state, and a step may differ by one code in few places and
by float32's rounding in the parameters, however many steps came before.
"""

import pytest
import torch

from alps_kernels import HeadAdamW
from tests.gpu import cases
from tests.gpu.cases import copies, equal, make, outside, set_grads

pytestmark = cases.MARKS
FLIPPED = 0.01  # share of codes that may be one off: those within some 1e-5 of a border, many times over
# Of a parameter; with 16 bits one unit in the last place.
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def assert_one_step_apart(ours, reference, params, twin, bound):
    for part, param, other in zip(bound.params, params, twin, strict=True):
        tolerance = ROUNDING[param.dtype]
        found, expected = part.cut(param.detach()).cpu().float(), part.cut(other.detach()).cpu().float()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=2e-6)
        assert (found != expected).double().mean() < 0.05  # 16-bit values differ where float32's rounding decides
        state, wanted = ours.state[param], reference.state[other]
        for name in ("exp_avg", "exp_avg_sq"):
            gap = (state[name].cpu().int() - wanted[name].cpu().int()).abs()
            assert gap.max() <= 1 and (gap > 0).double().mean() <= FLIPPED, (name, gap.max())
            torch.testing.assert_close(state[f"{name}_scale"].cpu(), wanted[f"{name}_scale"].cpu(), rtol=1e-6, atol=0)


def take_over(ours, reference, params, twin):
    """Our parameters and state become the reference's."""
    with torch.no_grad():
        for param, other in zip(params, twin, strict=True):
            param.copy_(other)
            for name, value in reference.state[other].items():
                ours.state[param][name].copy_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
def test_a_step_of_8_bit_moments_is_the_cpu_s_but_for_single_codes_sanitizer(dtype, capturable):
    params, bound = make(dtype)
    twin, twin_bound = make(dtype, "cpu")
    options = {"lr": 1e-2, "weight_decay": 0.1, "moment_dtype": "8bit"}
    ours = HeadAdamW(params, heads=bound, capturable=capturable, **options)
    reference = HeadAdamW(twin, heads=twin_bound, **options)
    before = copies(params)
    for step in range(5):
        set_grads(params, bound, step)
        set_grads(twin, twin_bound, step)
        ours.step()
        reference.step()
        assert_one_step_apart(ours, reference, params, twin, bound)
        for part, old in zip(bound.params, before, strict=True):
            assert torch.equal(outside(part, part.param.detach()), outside(part, old))
        take_over(ours, reference, params, twin)


def test_two_runs_of_8_bit_moments_are_equal_to_the_bit():
    results = []
    for _ in range(2):
        params, bound = make(torch.bfloat16)
        optimizer = HeadAdamW(params, lr=1e-2, heads=bound, moment_dtype="8bit")
        for step in range(4):
            set_grads(params, bound, step)
            optimizer.step()
        codes = [optimizer.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq")]
        results.append([*copies(params), *codes])
    assert equal(*results)
