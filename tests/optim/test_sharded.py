"""HeadAdamW on FSDP2's sharded parameters: 2 and 4 ranks against one process, to the byte."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import alps_kernels as alps
from alps_kernels.optim import state, state_dict as saved_state
from alps_kernels.selection import shards as sharding
from alps_kernels.tensors import dtensor as placement, local_part
from tests.support import ranks

from ..support.mutants import check_plantable, plant
from ..support.sharded_cases import cut_like, differences, heads_of, model_of, set_grads, shard
from .cases import same_bytes

OPTIONS = dict(lr=1e-2, weight_decay=0.1)


class Twins:
    """A model on one process and the same one sharded, each with its optimizer."""

    def __init__(self, kind, dtype=torch.float32, mesh=None, rest="frozen", parts=("q", "k", "v", "o"), **options):
        self.kind, self.parts = kind, parts
        self.models = [model_of(kind, dtype), shard(model_of(kind, dtype), mesh)]
        self.bound = [heads_of(kind, m, parts=parts).freeze(m, rest=rest) for m in self.models]
        self.optimizers = [alps.HeadAdamW(m.parameters(), heads=b, **{**OPTIONS, **options})
                           for m, b in zip(self.models, self.bound, strict=True)]

    def step(self, seed, scale=1.0, before=lambda optimizer: None):
        for model, bound, optimizer in zip(self.models, self.bound, self.optimizers, strict=True):
            set_grads(model, torch.Generator().manual_seed(seed), bound, scale)
            before(optimizer)
            optimizer.step()

    def set_heads(self, which):
        self.bound = [heads_of(self.kind, m, which, parts=self.parts).bind(m) for m in self.models]
        for bound, optimizer in zip(self.bound, self.optimizers, strict=True):
            optimizer.set_heads(bound)

    def differences(self):
        return differences(self.models[1], self.models[0])

    def state_differences(self, ours, theirs):
        """Entries of two state dicts that are not the same bytes; sharded ones are gathered."""
        found = [] if ours["state"].keys() == theirs["state"].keys() else ["other parameters have state"]
        for index, entry in ours["state"].items():
            other = theirs["state"].get(index, {})
            found += [] if entry.keys() == other.keys() else [f"{index}: {set(entry)} {set(other)}"]
            for key, value in entry.items():
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if key in other and not (whole.shape == other[key].shape and same_bytes(whole.reshape(-1), other[key].reshape(-1))):
                    found.append(f"state {index} {key} differs")
        return found


def steps(kind, dtype, options, rank, world, folder):
    """Steps, other heads, steps: weights and saved state of all ranks are those of one process."""
    twins = Twins(kind, dtype, **options)
    for seed in (1, 2):
        twins.step(seed)
    problems = twins.differences()
    twins.set_heads(1)
    for seed in (3, 4):
        twins.step(seed)
    saved = [optimizer.state_dict() for optimizer in twins.optimizers]
    problems += twins.differences() + twins.state_differences(saved[1], saved[0])
    if saved[0]["alps"] != saved[1]["alps"]:
        problems.append("the descriptions differ")
    dense = [optimizer.dense_state_dict() for optimizer in twins.optimizers]
    problems += twins.state_differences(dense[1], dense[0])
    for param, entry in twins.optimizers[1].state.items():
        problems += [f"{key} is not placed as its parameter" for key, value in entry.items()
                     if isinstance(value, DTensor) and value.placements != param.placements]
    held = sum(entry["exp_avg"].numel() for entry in twins.optimizers[1].state.values()
               if not isinstance(entry["exp_avg"], DTensor))
    total = torch.tensor(held)
    dist.all_reduce(total)
    expected = sum(entry["exp_avg"].numel() for entry in saved[0]["state"].values() if "slices" in entry)
    return problems + ([] if total == expected else [f"{total} compact elements on all ranks, {expected} selected"])


def hybrid(rank, world, folder):
    """Replicas of shards (2 x world/2): no element of the norm or the state counts twice."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    twins = Twins("llama", mesh=mesh, max_grad_norm=1e9)
    twins.step(1)
    problems = twins.differences()
    norms = [float(optimizer.grad_norm) for optimizer in twins.optimizers]
    if abs(norms[0] / norms[1] - 1) > 1e-6:
        problems.append(f"grad norm {norms[1]}, on one process {norms[0]}")
    saved = [optimizer.state_dict() for optimizer in twins.optimizers]
    return problems + twins.state_differences(saved[1], saved[0])


def clipping(rank, world, folder):
    """The global norm of the selected slices: the same bits on every rank, one process's to rounding."""
    twins = Twins("llama", max_grad_norm=0.5, rest="trainable")
    problems = []
    for seed in (1, 2, 3):
        twins.step(seed)
        one, many = (float(optimizer.grad_norm) for optimizer in twins.optimizers)
        every = [None] * world
        dist.all_gather_object(every, many)
        # Squares are summed in float32 within a block, and shards are other blocks.
        if len(set(every)) > 1 or not 0.5 < one or abs(one / many - 1) > 1e-6:
            problems.append(f"norms {every}, on one process {one}")
    others = dict(twins.models[0].named_parameters())
    for name, param in twins.models[1].named_parameters():
        mine, other = local_part(param).detach(), cut_like(param, others[name].detach())
        if mine.numel() and (mine - other).abs().max() > 1e-6:
            problems.append(f"{name} is {(mine - other).abs().max()} off")
    return problems


def scaler(rank, world, folder):
    """GradScaler: an infinity on one rank alone stops the step on all, and step counts stay."""
    twins = Twins("llama")
    model, optimizer = twins.models[1], twins.optimizers[1]
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = [local_part(p).detach().clone() for p in model.parameters()]
    problems = []
    for seed, spoil in ((1, True), (2, False)):
        grad_scaler.scale(torch.zeros(()))
        for m, bound in zip(twins.models, twins.bound, strict=True):
            set_grads(m, torch.Generator().manual_seed(seed), bound)
            for param in m.parameters():
                if param.grad is not None:
                    local_part(param.grad).nan_to_num_(0.0)
        for param in model.parameters():
            if param.grad is not None:
                local_part(param.grad).mul_(grad_scaler.get_scale())
        if spoil and rank == world - 1:
            held = [local_part(p.grad) for p in model.parameters() if p.grad is not None and local_part(p.grad).numel()]
            held[0].view(-1)[0] = float("inf")
        grad_scaler.step(optimizer)
        grad_scaler.update()
        if spoil and any(not torch.equal(local_part(p), b) for p, b in zip(model.parameters(), before, strict=True)):
            problems.append("weights moved in spite of the infinity")
    twins.optimizers[0].step()
    return problems + twins.differences()


def save(rank, world, folder):
    """Through DCP, torch.save and full_state_dict: what two steps made."""
    twins = Twins("llama", torch.bfloat16, rest="trainable")
    twins.step(1)
    twins.step(2)
    model, optimizer = twins.models[1], twins.optimizers[1]
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / f"dcp{world}")
    full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(full, folder / f"full{world}.pt")
    return twins.differences()


def load(saved_by, rank, world, folder):
    """What another number of ranks saved goes on as one process that never stopped."""
    straight = Twins("llama", torch.bfloat16, rest="trainable")
    for seed in (1, 2, 3):
        straight.step(seed)
    problems = []
    for way in ("dcp", "full"):
        twins = Twins("llama", torch.bfloat16, rest="trainable", lr=5.0)
        model, optimizer = twins.models[1], twins.optimizers[1]
        with torch.no_grad():
            for param in model.parameters():
                local_part(param).add_(1.0)
        options = StateDictOptions(full_state_dict=way == "full")
        if way == "dcp":
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            dcp.load(states, checkpoint_id=folder / f"dcp{saved_by}")
        else:
            states = dict(zip(("model", "optimizer"), torch.load(folder / f"full{saved_by}.pt"), strict=True))
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"],
                       options=options)
        set_grads(model, torch.Generator().manual_seed(3), twins.bound[1])
        optimizer.step()
        problems += [f"{way}: {line}" for line in differences(model, straight.models[0])]
    return problems


def carry(rank, world, folder):
    """One process's state dict on many ranks, many ranks' on one process, torch's dense one on ours."""
    twins = Twins("llama", rest="trainable")
    twins.step(1)
    file = io.BytesIO()
    torch.save(twins.optimizers[0].state_dict(), file)
    file.seek(0)
    saved = [torch.load(file), twins.optimizers[1].state_dict()]
    again = Twins("llama", rest="trainable", lr=5.0)
    for mine, model in zip(again.models, twins.models, strict=True):
        with torch.no_grad():
            for p, q in zip(mine.parameters(), model.parameters(), strict=True):
                local_part(p).copy_(local_part(q))
    again.optimizers[1].load_state_dict(saved[0])
    again.optimizers[0].load_state_dict(saved[1])
    for pair in (twins, again):
        pair.step(2)
    problems = again.differences() + differences(again.models[1], twins.models[0])

    dense = [optimizer.dense_state_dict() for optimizer in twins.optimizers]
    third = Twins("llama", rest="trainable")
    for optimizer, model, state_dict in zip(third.optimizers, third.models, dense, strict=True):
        plain = torch.optim.AdamW(model.parameters(), **OPTIONS)
        plain.load_state_dict(copy.deepcopy(state_dict))
        optimizer.load_state_dict(plain.state_dict())
    third.step(3)
    return problems + third.differences()


def refusals(rank, world, folder):
    """What does not fit is refused on every rank before anything changes, with its name."""
    problems = []

    def expect(message, call):
        try:
            call()
        except ValueError as error:
            if message not in str(error):
                problems.append(f"expected {message!r} in: {error}")
        else:
            problems.append(f"nothing refused: {message}")

    twins = Twins("llama")
    twins.step(1)
    model, optimizer = twins.models[1], twins.optimizers[1]
    before = [local_part(p).detach().clone() for p in model.parameters()]
    other = heads_of("llama", model, 1).bind(model)
    wrong = alps.HeadAdamW(model.parameters(), heads=other)
    undescribed = {key: value for key, value in optimizer.state_dict().items() if key != "alps"}
    expect("another selection", lambda: wrong.load_state_dict(optimizer.state_dict()))
    expect("another selection: model.layers.2.self_attn.q_proj.weight: spans", lambda: wrong.load_state_dict(undescribed))
    mesh = init_device_mesh("cpu", (world,))
    from torch.distributed.tensor import Partial, Shard
    partial_sum = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()]))
    expect("placements", lambda: alps.HeadAdamW([partial_sum]))
    uneven = torch.nn.Parameter(DTensor.from_local(torch.ones(1 + 5 * (rank > 0), 4), mesh, [Shard(0)], run_check=False,
                                                   shape=(5 * world + 1 - 5, 4), stride=(4, 1)))
    expect("this rank holds", lambda: alps.HeadAdamW([uneven]))
    target = twins.bound[1].params[0].param
    kept = target.grad
    target.grad = DTensor.from_local(torch.zeros(target.shape), mesh, [Partial()], run_check=False)
    expect("expected a DTensor placed as the parameter is", optimizer.step)
    target.grad = kept
    unsharded = model_of("llama")
    bound_before = heads_of("llama", unsharded).bind(unsharded)
    sharded = shard(unsharded)
    expect("bind it again after fully_shard", lambda: alps.HeadAdamW(sharded.parameters(), heads=bound_before))
    problems += [f"{name} moved" for (name, p), b in zip(model.named_parameters(), before, strict=True)
                 if not torch.equal(local_part(p), b)]
    return problems


def train(rank, world, folder):
    """The real thing: forward, reduce-scatter, step. Equal micro-batches on all ranks, so sums are exact."""
    models = [model_of("llama"), shard(model_of("llama"))]
    bounds = [heads_of("llama", m).freeze(m) for m in models]
    return _trained(models, [alps.HeadAdamW(m.parameters(), heads=b, **OPTIONS) for m, b in zip(models, bounds, strict=True)],
                    {part.name for part in bounds[1].params})


def train_all(rank, world, folder):
    """A plain AdamW, without heads: as torch's own on one process."""
    models = [model_of("llama"), shard(model_of("llama"))]
    return _trained(models, [torch.optim.AdamW(models[0].parameters(), foreach=False, **OPTIONS),
                             alps.HeadAdamW(models[1].parameters(), **OPTIONS)], {n for n, _ in models[1].named_parameters()})


def _trained(models, optimizers, trained):
    before = {name: local_part(p).detach().clone() for name, p in models[1].named_parameters()}
    tokens = torch.randint(0, 29, (2, 7), generator=torch.Generator().manual_seed(4))
    losses = []
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    problems = differences(models[1], models[0])
    problems += [f"losses {losses}"] if losses[::2] != losses[1::2] or losses[0] == losses[-1] else []
    problems += [f"{name} is frozen and moved" for name, p in models[1].named_parameters()
                 if name not in trained and not same_bytes(local_part(p).detach(), before[name])]
    return problems


CHECKS = {
    "steps_llama": partial(steps, "llama", torch.float32, {"amsgrad": True}),
    "steps_gpt2_fused_columns": partial(steps, "gpt2", torch.float32, {}),
    "steps_split_master": partial(steps, "llama", torch.bfloat16, {"rest": "trainable"}),
    "steps_kahan": partial(steps, "gpt2", torch.bfloat16, {"master": "kahan", "rest": "trainable"}),
    "hybrid": hybrid, "clipping": clipping, "scaler": scaler, "carry": carry, "refusals": refusals, "train": train,
    "train_all": train_all,
    "save": save,
}
GROUPS = "        for group in shard_groups(params[members[0]]) if key else ():\n"
FAULTS = {  # of sharding and its use, each seen by the check beside it
    "the norm of one rank": (placement, [(GROUPS, "        for group in ():\n")], "clipping"),
    "the norm counts replicas": (placement, [("enumerate(param.placements) if p.is_shard()", "enumerate(param.placements)")],
                                 "hybrid"),
    "a rank skips the gathering": (placement, [("    for group in shard_groups(param):", "    for group in ():")], "steps_llama"),
    "a shard begins one row early": (sharding, [("last) - first\n", "last) - max(first - 1, 0)\n")], "steps_llama"),
    "every shard is the first": (sharding, [("min(max(edge, first), last) - first", "edge")], "steps_llama"),
    "gathered ranges overlap": (sharding, [("here + size\n", "here\n")], "steps_gpt2_fused_columns"),
    "rows of a column range as many as all ranks'": (state, [("if dim == 0 else rows\n",
                                                     "if dim == 0 else self.param.shape[0]\n")],
                                            "steps_gpt2_fused_columns"),
    "whole state is not sharded": (state, [("placed_like(self.param, held) if self.part.full else held", "held")], "train_all"),
    "dense state of another rank": (placement, [("value.narrow(dim, start, stop - start)",
                                                "value.narrow(dim, 0, stop - start)")], "carry"),
    "slices are not read": (saved_state, [("    if slices is None or", "    if True or")], "refusals"),
    "the description is not of all ranks'": (saved_state, [("else gather_compact(slot.part, value)", "else value")], "steps_llama"),
}


def faulty(name, rank, world, folder):
    module, edits, check = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, module, *edits)
        return CHECKS[check](rank, world, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds")
    two = ranks.run(2, CHECKS, folder)
    four = ranks.run(4, {**CHECKS, "load_of_2": partial(load, 2)}, folder)
    return {2: {**two, **ranks.run(2, {"load_of_4": partial(load, 4)}, folder)}, 4: four}


@pytest.mark.parametrize("world, check", [*((world, name) for name in CHECKS for world in (2, 4)),
                                          (4, "load_of_2"), (2, "load_of_4")])
def test_many_ranks_are_one(found, world, check):
    assert found[world][check] == []


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tmp_path):
    module, edits, _ = FAULTS[name]
    check_plantable(module, *edits)
    assert ranks.run(2, {"faulty": partial(faulty, name)}, tmp_path, patience=10)["faulty"]
