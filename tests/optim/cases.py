"""Parameters cut in every way, gradients poisoned outside the cut, and runs over them."""

import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam, BoundSelection, HeadSelection
from alps_kernels.tensors import SyncedSlice


def bind(*parts):
    return BoundSelection(HeadSelection([], []), tuple(parts), "frozen", None)


def toy(dtype=torch.float32, n=48, d=24, seed=0):
    """rows: two runs of rows; cols: two of columns; all: the whole; bias: a run; frozen: nothing."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"rows": (n, d), "cols": (n, d), "all": (n, d), "bias": (n,), "frozen": (n, d)}
    params = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}
    return params, selection(params)


def selection(params, rows=((0, 8), (16, 24)), cols=((0, 8), (16, 19)), bias=((8, 24),)):
    n = params["all"].shape[0]
    return bind(BoundParam("rows", params["rows"], 0, rows), BoundParam("cols", params["cols"], 1, cols),
                BoundParam("all", params["all"], 0, ((0, n),)), BoundParam("bias", params["bias"], 0, bias))


def masks(params, bound):
    """For every parameter, True where it trains."""
    inside = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in params.items()}
    for part in bound.params:
        for block in part.blocks(inside[part.name]):
            block.fill_(True)
    return inside


def fill_grads(params, bound, generator, *, outside=float("nan"), scale=1.0):
    """Normal gradients on what trains and `outside` everywhere else; the same numbers for any selection."""
    inside = masks(params, bound)
    for name, param in params.items():
        grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        param.grad = torch.where(inside[name], grad, torch.full_like(grad, outside))


def run(params, optimizer, bound, steps, seed=1, **grads):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        fill_grads(params, bound, generator, **grads)
        optimizer.step()


def snapshot(params):
    return {name: p.detach().clone() for name, p in params.items()}


def same_bytes(a, b):
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))


def assert_frozen(params, before, bound):
    """Every byte outside `bound` is what it was; inside, something moved and nothing is NaN."""
    for name, inside in masks(params, bound).items():
        now, then = params[name].detach(), before[name]
        assert same_bytes(now[~inside], then[~inside]), f"bytes of {name} outside the selection moved"
        assert not now[inside].isnan().any(), f"a NaN came into {name}"
        assert not inside.any() or (now[inside] != then[inside]).any(), f"{name} did not move"


def make(params, bound, **options):
    return HeadAdamW(list(params.values()), **{"lr": 1e-2, "weight_decay": 0.1, "heads": bound, **options})


def formula(params, bound, grads_of_step, *, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1):
    """AdamW in float64 by its formula, on the selected elements; every other element stays."""
    inside = masks(params, bound)
    out = {}
    for name, start in params.items():
        p = start.detach().double()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for t, grads in enumerate(grads_of_step, 1):
            g = torch.where(inside[name], grads[name].double(), 0.0)
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            update = lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            p = torch.where(inside[name], p * (1 - lr * weight_decay) - update, p)
        out[name] = p
    return out


def sliced_module(weight, dim, ranges):
    """A module whose `weight` holds a synchronised copy of the leaf `weight_slice`, its selected rows or columns."""
    module = nn.Module()
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.synced = SyncedSlice(module, "weight", dim, ranges, True)
    module.weight_slice = nn.Parameter(module.synced.cut(module.weight).contiguous())
    module.synced.adopt()
    return module
