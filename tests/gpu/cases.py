"""What the GPU tests share: the device, parameters cut in every way, gradients that are NaN outside the cut."""

import pytest
import torch
from torch import nn

from alps_kernels.selection import BoundParam, BoundSelection
from alps_kernels.selection.binding import SelectionCount

DEVICE = "cuda"
MARKS = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def bound_to(*parts):
    """A selection of (parameter, dim, ranges)."""
    params = tuple(BoundParam(f"p{i}", p, dim, ranges) for i, (p, dim, ranges) in enumerate(parts))
    return BoundSelection(None, params, "frozen", SelectionCount({}, {}))


def make(dtype, device=None, seed=0):
    device = device or DEVICE
    generator = torch.Generator("cpu").manual_seed(seed)
    params = [nn.Parameter(torch.randn(*shape, generator=generator, device="cpu").to(device, dtype))
              for shape in ((256, 192), (128, 256), (256,), (65, 190))]
    # Rows, columns, a bias and columns at odd places: the last two cannot be read 16 bytes at a time.
    parts = ((params[0], 0, ((0, 64), (128, 192))), (params[1], 1, ((32, 64), (96, 160))), (params[2], 0, ((0, 63),)),
             (params[3], 1, ((5, 12), (70, 143))))
    return params, bound_to(*parts)


def twin_of(params, bound):
    """The same values and selection in other parameters."""
    twin = [nn.Parameter(p.detach().clone()) for p in params]
    return twin, bound_to(*((t, part.dim, part.ranges) for t, part in zip(twin, bound.params, strict=True)))


def set_grads(params, bound, step, scale=1.0):
    """New gradients, that are NaN outside the selection."""
    generator = torch.Generator("cpu").manual_seed(100 + step)
    for part in bound.params:
        grad = torch.full_like(part.param, torch.nan)
        for block in part.blocks(grad):
            block.copy_(scale * torch.randn(block.shape, generator=generator, device="cpu"))
        part.param.grad = grad


def refill_grads(params, bound, step, scale=1.0):
    """The same values where the gradients are."""
    where = [p.grad for p in params]
    set_grads(params, bound, step, scale)
    for param, grad in zip(params, where, strict=True):
        param.grad = grad.copy_(param.grad)


def outside(part, tensor):
    mask = torch.ones_like(tensor, dtype=torch.bool)
    for block in part.blocks(mask):
        block.fill_(False)
    return tensor[mask].view(torch.uint8)


def copies(params):
    return [p.detach().clone() for p in params]


def equal(a, b):
    """To the bit."""
    sides = zip(a, b, strict=True)
    return all(torch.equal(x.detach().view(torch.uint8), y.detach().view(torch.uint8)) for x, y in sides)
