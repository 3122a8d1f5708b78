"""The guard on models that FSDP2 shards: each rank watches what it holds."""

import pytest
import torch

import alps_kernels as alps
from alps_kernels.tensors import is_sharded, local_part
from tests.support import ranks
from tests.support.sharded_cases import heads_of, model_of, set_grads, shard

from .models import some_heads, tiny


def watched(kind, rank):
    """Problems of one rank: a step is not seen, a byte outside is seen by the rank that holds it and by no other."""
    model = shard(model_of(kind))
    heads = heads_of(kind, model)
    bound = heads.freeze(model)
    guard, problems = alps.guard(model, heads), []
    optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=bound)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        set_grads(model, generator, bound)
        optimizer.step()
    problems += [f"a step moved {change}" for change in guard.changes()]
    params = dict(model.named_parameters())
    trained = {part.name for part in bound.params}
    for name, param in params.items():
        held = local_part(param.data)
        if not held.numel() or name in trained:
            continue
        held.view(-1).view(torch.int32)[-1] ^= 1
        if [change.name for change in guard.changes()] != [name]:
            problems.append(f"a flipped bit of {name} gave {guard.changes()}")
        held.view(-1).view(torch.int32)[-1] ^= 1
    part = next(p for p in bound.params if is_sharded(p.param) and p.dim == 0 and len(p.ranges) and p.param.ndim == 2)
    before = local_part(part.param.data).clone()
    local_part(part.param.data).view(torch.int32).bitwise_xor_(1)  # every row that this rank holds, trained or not
    seen = sum(stop - start for change in guard.changes() for start, stop in change.rows)
    from alps_kernels.selection import part_here

    inside = sum(stop - start for start, stop in part_here(part).ranges)
    if seen != len(before) - inside:
        problems.append(f"{len(before)} rows flipped, {inside} of them trained, {seen} seen")
    local_part(part.param.data).copy_(before)
    return problems + [f"left {change}" for change in guard.changes()]


def llama(rank, world, folder):
    return watched("llama", rank)


def gpt2(rank, world, folder):
    return watched("gpt2", rank)


@pytest.mark.fault("The guard")
@pytest.mark.parametrize("world", [1, 2])
def test_sharded(world, tmp_path):
    """FSDP2 over one and two ranks: steps are not seen, every flipped bit outside is, on the rank that holds it"""
    found = ranks.run(world, {"llama": llama, "gpt2": gpt2}, tmp_path)
    assert not any(found.values()), found


@pytest.mark.fault("The guard")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "bert"])
def test_sliced(family):
    """sliced models: steps and refreshed weights are not seen, a byte outside is; a guard made before slicing holds on too"""
    model = tiny(family)
    heads = some_heads(model)
    plain = alps.guard(model, heads)
    bound = alps.slice_heads(model, heads)
    guard = alps.guard(model)
    for optimizer in (alps.HeadAdamW(model.parameters(), lr=1e-2, heads=bound), torch.optim.AdamW([p.param for p in bound.params], lr=1e-2)):
        from .models import train

        train(model, optimizer, 3)
        assert guard.changes() == plain.changes() == ()
    name, weight = next((n, p) for n, p in model.named_parameters() if n + "_slice" in dict(model.named_parameters()) and p.ndim == 2)
    part = heads.bind(tiny(family)).params
    cut = next(p for p in part if p.name == name)
    free = next(i for i in range(weight.shape[cut.dim]) if not any(a <= i < b for a, b in cut.ranges))
    before = weight.detach().clone()
    weight.data.select(cut.dim, free)[0] += 1
    for watcher in (guard, plain):
        change, = watcher.changes()
        assert change.name == name and (change.rows if cut.dim == 0 else change.columns) == ((free, free + 1),)
    weight.data.copy_(before)
    alps.unslice_heads(model)
    assert plain.changes() == ()


def accumulating(rank, world, folder):
    """Problems of one rank of DDP: three micro-batches without sync and one with, plain and sliced."""
    from contextlib import nullcontext

    from torch.nn.parallel import DistributedDataParallel

    problems = []
    for sliced in (False, True):
        model = tiny()
        heads = some_heads(model)
        bound = alps.slice_heads(model, heads) if sliced else heads.freeze(model)
        wrapped, guard = DistributedDataParallel(model), alps.guard(model, heads)
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=bound)
        for step in range(3):
            optimizer.zero_grad()
            for i in range(4):
                with wrapped.no_sync() if i < 3 else nullcontext():
                    tokens = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(100 * step + 10 * i + rank))
                    (wrapped(input_ids=tokens, labels=tokens).loss / 4).backward()
            optimizer.step()
        problems += [f"sliced={sliced}: moved {change}" for change in guard.changes()]
        mine = torch.cat([part.cut(part.param.detach()) for part in bound.params])
        theirs = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(theirs, mine)
        if not all(torch.equal(other, mine) for other in theirs):
            problems.append(f"sliced={sliced}: the ranks went apart")
    return problems


@pytest.mark.fault("Frozen bytes")
def test_accumulation_with_sync_off_and_on(tmp_path):
    """DDP over two ranks, three micro-batches under no_sync and one with sync, plain and sliced: frozen bytes stay, ranks agree"""
    found = ranks.run(2, {"accumulating": accumulating}, tmp_path)
    assert not any(found.values()), found
