"""The smallest thing with heads."""

import copy

import torch
from einops import repeat
from torch import nn

import alps_kernels as alps
from alps_kernels.layout import AttentionLayer, HeadLayout, HeadSlice


class Projections(nn.Module):
    """Four heads of 3 in q, two groups in k and v, o: the smallest thing with heads."""

    def __init__(self, bias=True, dtype=torch.float64):
        super().__init__()
        self.q, self.k = nn.Linear(10, 12, bias, dtype=dtype), nn.Linear(10, 6, bias, dtype=dtype)
        self.v, self.o = nn.Linear(10, 6, bias, dtype=dtype), nn.Linear(12, 10, bias, dtype=dtype)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        k, v = (repeat(x, "... d -> ... (d two)", two=2) for x in (k, v))
        return self.o(q * k.tanh() + v)

    def layout(self):
        def of(name, role, dim, i):
            parts = [HeadSlice(f"{name}.weight", role, dim, 3 * i, 3 * i + 3)]
            if dim == 0 and self.q.bias is not None:
                parts.append(HeadSlice(f"{name}.bias", role, 0, 3 * i, 3 * i + 3, bias=True))
            return tuple(parts)

        heads = tuple(of("q", "q", 0, h) + of("o", "o", 1, h) for h in range(4))
        groups = tuple(of("k", "k", 0, g) + of("v", "v", 0, g) for g in range(2))
        shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        return HeadLayout((AttentionLayer(0, "", "self", "", heads, groups, (0, 0, 1, 1)),), shapes, "toy")


def toy(heads=((0, 0), (0, 3)), parts=("q", "k", "v", "o"), kv="all", bias=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = Projections(bias, dtype)
    selection = alps.HeadSelection(heads, (4,), parts=parts, kv=kv)
    return model, selection, copy.deepcopy(model)
