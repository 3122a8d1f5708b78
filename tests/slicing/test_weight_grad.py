"""head_grad is the whole gradient, cut; by the cheaper of its two ways."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alps_kernels.slicing import head_grad, oracle

N, K, M = 7, 24, 10
RANGES = {"one": ((4, 9),), "apart": ((0, 2), (20, 21)), "many": ((0, 1), (3, 4), (6, 9), (23, 24)),
          "almost all": ((0, 11), (12, 24)), "all": ((0, 24),)}


def operands(n=N, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, (n, K), generator=generator).to(dtype),
            torch.randint(-8, 9, (n, M), generator=generator).to(dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("n", [0, 1, N])
def test_head_grad(n, ranges, transposed):
    cut, other = operands(n)
    outside = torch.ones(K, dtype=torch.bool)
    for start, stop in ranges:
        outside[start:stop] = False
    poisoned = cut.clone()
    poisoned[:, outside] = float("nan")
    got = head_grad(poisoned, other, ranges, transposed=transposed)
    assert torch.equal(got, oracle.head_grad(cut, other, ranges, transposed=transposed))  # whole numbers: exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_has_the_dtype_of_its_operands(dtype):
    cut, other = operands(dtype=dtype)
    got = head_grad(cut, other, RANGES["many"])
    assert got.dtype == dtype and torch.equal(got, oracle.head_grad(cut, other, RANGES["many"]))


def test_strided_operands():
    cut, other = operands()
    wide = torch.full((N, 3, K), float("nan"), dtype=cut.dtype)
    wide[:, 1] = cut
    for ranges in RANGES.values():
        assert torch.equal(head_grad(wide[:, 1], other.t().contiguous().t(), ranges), oracle.head_grad(cut, other, ranges))


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name, mms, gathers", [("one", 1, 0), ("apart", 1, 1), ("many", 1, 1), ("almost all", 2, 0), ("all", 1, 0)])
def test_one_product_where_the_gather_is_cheap(name, mms, gathers):
    """One run: a strided product. Few selected columns apart: gathered. Nearly all: run by run, and no copy of `cut`."""
    cut, other = operands()
    with Ops() as ops:
        head_grad(cut, other, RANGES[name])
    assert ops.seen.count("mm") == mms
    assert ("cat" in ops.seen and ops.seen.index("cat") < ops.seen.index("mm")) == bool(gathers)
