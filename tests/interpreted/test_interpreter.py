"""The patched interpreter itself: bfloat16 casts as torch's, arithmetic on bfloat16 refused."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast_kernel(x_ptr, out_ptr, n: tl.constexpr):
    offs = tl.arange(0, n)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


@triton.jit
def _add_kernel(x_ptr, out_ptr, n: tl.constexpr):
    offs = tl.arange(0, n)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, x + x)


def _values():
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3.4e38, 1.00390625, 1.01171875]
    return torch.cat([torch.tensor(special), torch.randn(1024 - len(special))])


def test_float32_to_bfloat16_rounds_as_torch_does():
    x = _values()
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, out, n=x.numel())
    same = out.view(torch.int16) == x.bfloat16().view(torch.int16)
    assert (same | x.isnan()).all() and out[x.isnan()].isnan().all()


def test_bfloat16_to_float32_is_exact():
    x = _values().bfloat16()
    out = torch.empty_like(x, dtype=torch.float32)
    _cast_kernel[(1,)](x, out, n=x.numel())
    assert torch.equal(out.view(torch.int32)[~x.isnan()], x.float().view(torch.int32)[~x.isnan()])


def test_bfloat16_arithmetic_is_refused():
    x = torch.randn(16).bfloat16()
    with pytest.raises(Exception, match="cast to float32"):
        _add_kernel[(1,)](x, torch.empty_like(x), n=16)
