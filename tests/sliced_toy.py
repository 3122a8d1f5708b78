"""The smallest thing with heads, sliced; light to import, for processes of their own."""

import copy

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

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
        return self.o(q * k.repeat_interleave(2, -1).tanh() + v.repeat_interleave(2, -1))

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


def replica(rank, world, folder):
    """One of `world` processes that train the toy by DDP; leaves its state dict in `folder`."""
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)
    _, selection, model = toy(seed=rank)  # replicas begin unlike: DDP makes them rank 0's
    bound = alps.slice_heads(model, selection, layout=model.layout())
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([part.param for part in bound.params], 0.05)
    for step in range(3):
        x = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    destroy_process_group()
