"""Sliced models under DDP and FSDP2: 2 and 4 ranks against one process."""

import contextlib
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import alps_kernels as alps
from alps_kernels.slicing import projection as sliced_projection
from alps_kernels.tensors import dtensor as placement, local_part, synced_slices
from tests.support import ranks

from ..optim.cases import same_bytes
from ..support.mutants import check_plantable, plant
from ..support.sharded_cases import heads_of, model_of, shard

OPTIONS = dict(lr=1e-2, weight_decay=0.1)


def sliced(kind, dtype=torch.float32, rest="frozen"):
    """A sliced model and the values of its full parameters before any step."""
    model = model_of(kind, dtype)
    heads = heads_of(kind, model)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    alps.slice_heads(model, heads, rest=rest)
    return model, heads, before


def optimizer_of(model, heads, which="ours"):
    if which == "torch":
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **OPTIONS)
    return alps.HeadAdamW(model.parameters(), heads=heads.bind(model), **OPTIONS)


def tokens(seed, rows=2):
    return torch.randint(2, 29, (rows, 7), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def train(model, optimizer, batches, clip=None):
    """One step for each entry of `batches`, a list of micro-batches whose gradients add up."""
    losses = []
    for micro in batches:
        for ids in micro:
            loss = loss_of(model, ids) / len(micro)
            loss.backward()
            losses.append(float(loss.detach()))
        if clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole_state(model):
    """The plain model's state dict, on every rank."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()}


def differences(state, other, bound=0.0):
    """Tensors of two state dicts that differ by more than `bound`; by a byte where it is 0."""
    found = [] if state.keys() == other.keys() else [f"keys {state.keys() ^ other.keys()}"]
    for name in state.keys() & other.keys():
        a, b = state[name].detach(), other[name].detach()
        if not (same_bytes(a, b) if bound == 0 else (a - b).abs().max() <= bound):
            found.append(f"{name} is up to {(a.double() - b.double()).abs().max():.3e} off")
    return found


def frozen_moved(state, before, kind, rest="frozen"):
    """Full parameters of which a byte outside the selection is not what it was; or nothing moved at all."""
    plain = model_of(kind)
    chosen = {part.name: part for part in heads_of(kind, plain).bind(plain, rest=rest).params}
    found, moved = [], 0
    for name, then in before.items():
        inside = torch.zeros(then.shape, dtype=torch.bool)
        if name in chosen:
            for start, stop in chosen[name].ranges:
                inside.narrow(chosen[name].dim, start, stop - start).fill_(True)
        now = state[name].detach()
        found += [] if same_bytes(now[~inside], then[~inside]) else [f"frozen bytes of {name} moved"]
        moved += int((now[inside] != then[inside]).sum())
    return found if moved else [*found, "nothing moved"]


def leaf_numels(model):
    return [p.numel() for p in model.parameters() if p.requires_grad]


def ddp(kind, equal, which, rank, world, folder):
    """Losses, weights and bytes on the wire of DDP against one process that adds up the micro-batches.

    Equal micro-batches: to the byte. Different ones in float64: to 1e-9, for the order of sums.
    """
    dtype = torch.float32 if equal else torch.float64
    one, heads, before = sliced(kind, dtype)
    micro = [[tokens(step * 10 + (0 if equal else r)) for r in range(world)] for step in range(3)]
    alone = train(one, optimizer_of(one, heads, which), micro)

    many, heads, _ = sliced(kind, dtype)
    wrapped, sent = DistributedDataParallel(many), []

    def counted(state, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    wrapped.register_comm_hook(None, counted)
    optimizer = optimizer_of(many, heads, which)
    losses = [loss / world for loss in train(wrapped, optimizer, [[step[rank]] for step in micro])]
    state = whole_state(many)
    problems = differences(state, whole_state(one), 0.0 if equal else 1e-9) + frozen_moved(state, before, kind)
    if max(abs(a - b) for a, b in zip(losses, alone[rank::world], strict=True)) > (0 if equal else 1e-12):
        problems.append(f"losses {losses}, alone {alone[rank::world]}")
    if sum(sent) != 3 * sum(leaf_numels(many)):
        problems.append(f"{sum(sent)} elements sent in 3 steps, {sum(leaf_numels(many))} selected")
    with wrapped.no_sync():
        loss_of(wrapped, micro[0][rank]).backward()
    plain = alps.unslice_heads(many)
    return problems + differences(plain.state_dict(), state)


@contextlib.contextmanager
def counting_scatters():
    """Elements of everything that FSDP2 hands to a reduce-scatter."""
    sent = []

    def counted(original, **tensors):
        sent.append(tensors["input"].numel())
        return original(**tensors)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_scatter_single", "reduce_scatter_tensor"):  # what torch 2.13 and what others call
            if hasattr(dist, name):
                patch.setattr(dist, name, partial(counted, getattr(dist, name)))
        yield sent


def fsdp(kind, options, which, equal, clip, checkpointing, rank, world, folder):
    """The same of FSDP2. What is reduced is the leaves, each padded to a whole number of rows per rank."""
    exact = equal and not clip  # a clipped norm is summed in another order
    dtype = torch.float32 if exact else torch.float64
    one, heads, before = sliced(kind, dtype)
    micro = [[tokens(step * 10 + (0 if equal else r)) for r in range(world)] for step in range(3)]
    many, _, _ = sliced(kind, dtype)
    padded = sum(-(-p.shape[0] // world) * world * (p.numel() // p.shape[0]) for p in many.parameters() if p.requires_grad)
    solo = None
    if "mp_policy" in options:  # one rank of FSDP2 casts as many do
        solo = init_device_mesh("cpu", (world, 1), mesh_dim_names=("rank", "solo"))["solo"]
        shard(one, solo, **options)
    if checkpointing:
        many.gradient_checkpointing_enable({"use_reentrant": False})
        many.train(), one.train()
    alone = train(one, optimizer_of(one, heads, which), micro, clip)
    shard(many, **options)
    optimizer = optimizer_of(many, heads, which)
    with counting_scatters() as sent:
        losses = [loss / world for loss in train(many, optimizer, [[step[rank]] for step in micro], clip)]
    state, other = whole_state(many), whole_state(one)
    bound = 0.0 if exact else 1e-9
    problems = differences(state, other, bound) + frozen_moved(state, before, kind)
    if max(abs(a - b) for a, b in zip(losses, alone[rank::world], strict=True)) > bound:
        problems.append(f"losses {losses}, alone {alone[rank::world]}")
    if sum(sent) != 3 * padded:
        problems.append(f"{sum(sent)} elements reduced in 3 steps, {padded} selected and padded")
    again = whole_state(many)
    problems += differences(again, state)
    held = [value for entry in optimizer.state.values() for key, value in entry.items() if key == "exp_avg"]
    if any(not isinstance(value, DTensor) for value in held):
        problems.append("state of a leaf is not sharded")
    try:
        alps.unslice_heads(many)
        problems.append("unslice_heads did not refuse")
    except ValueError as error:
        problems += [] if "state_dict()" in str(error) else [str(error)]
    plain = model_of(kind, dtype)
    plain.load_state_dict(again)
    ids = tokens(99)
    with torch.no_grad():
        a, b = loss_of(plain, ids), loss_of(many, ids)
    return problems + ([] if "mp_policy" in options or torch.equal(a, b) else [f"plain model's loss {a}, sharded {b}"])


def _start(kind, dtype, lr=OPTIONS["lr"]):
    model, heads, _ = sliced(kind, dtype)
    shard(model)
    return model, alps.HeadAdamW(model.parameters(), heads=heads.bind(model), lr=lr)


def save(rank, world, folder):
    model, optimizer = _start("llama", torch.bfloat16)
    train(model, optimizer, [[tokens(1)], [tokens(2)]])
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=folder / f"dcp{world}")
    full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save(full, folder / f"full{world}.pt")
    plain = set(model_of("llama").state_dict())
    return [] if set(states[0]) == plain else [f"keys {set(states[0]) ^ plain}"]


def load(saved_by, rank, world, folder):
    """What another number of ranks saved goes on as a run of this many that never stopped."""
    straight, optimizer = _start("llama", torch.bfloat16)
    train(straight, optimizer, [[tokens(1)], [tokens(2)], [tokens(3)]])
    expected, problems = whole_state(straight), []
    for way in ("dcp", "full"):
        model, optimizer = _start("llama", torch.bfloat16, lr=5.0)
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
        train(model, optimizer, [[tokens(3)]])
        problems += [f"{way}: {line}" for line in differences(whole_state(model), expected)]
    return problems


BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
CHECKS = {
    "ddp": partial(ddp, "llama", True, "ours"),
    "ddp_torch": partial(ddp, "gpt2", True, "torch"),
    "ddp_other_batches": partial(ddp, "llama", False, "ours"),
    "fsdp": partial(fsdp, "llama", {"reshard_after_forward": True}, "ours", True, None, False),
    "fsdp_kept": partial(fsdp, "gpt2", {"reshard_after_forward": False}, "ours", True, None, False),
    "fsdp_torch": partial(fsdp, "llama", {"reshard_after_forward": True}, "torch", True, None, True),
    "fsdp_clip": partial(fsdp, "gpt2", {"reshard_after_forward": True}, "torch", True, 0.1, False),
    "fsdp_bf16": partial(fsdp, "llama", BF16, "ours", True, None, False),
    "fsdp_other_batches": partial(fsdp, "gpt2", {"reshard_after_forward": True}, "ours", False, None, False),
    "save": save,
}


def save_and_load(rank, world, folder):
    return save(rank, world, folder) + load(world, rank, world, folder)


FAULTS = {
    "a rank skips the sync": (sys.modules[__name__], [(
        "        sent.append(bucket.buffer().numel())\n        return allreduce_hook(state, bucket)\n", """\
        sent.append(bucket.buffer().numel())
        if rank == 0:
            return allreduce_hook(state, bucket)
        alone = torch.futures.Future()
        dist.all_reduce(bucket.buffer().clone())
        alone.set_result(bucket.buffer())
        return alone
""")], CHECKS["ddp_other_batches"]),
    "the state dict has old weights": (synced_slices, [("return write_ranges(weight, leaf, self.dim, self.ranges)", "return")],
                                       CHECKS["fsdp"]),
    "every range takes the leaf's first rows": (placement, [("at += span[1] - span[0]", "at += 0")], CHECKS["fsdp"]),
    "every rank takes the leaf's first rows": (placement, [("low - start if size else 0", "0")], CHECKS["fsdp"]),
    "a shard begins one row late": (placement, [("start, stop = span if axis == dim",
                                                 "start, stop = (span[0] + 1, span[1]) if axis == dim")], CHECKS["fsdp"]),
    "backward with the weight as gathered": (sliced_projection, [("        if leaf is not None:\n            ctx.synced[0]",
                                                                  "        if False:\n            ctx.synced[0]")],
                                             CHECKS["fsdp"]),
    "forward with the weight as gathered": (synced_slices, [("self._copy(weight, leaf, silent=True)", "pass")], CHECKS["fsdp_kept"]),
    "leaves not loaded": (sliced_projection, [("        local_part(leaf).copy_(held)\n", "        pass\n")],
                          save_and_load),
    "leaves loaded from one rank": (placement, [("return sum_bytes_(whole, weight)", "return whole")], save_and_load),
}


def faulty(name, rank, world, folder):
    module, edits, check = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, module, *edits)
        return check(rank, world, folder)


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


def test_a_state_dict_that_was_filled_in_place_is_loaded():
    """As torch.distributed.checkpoint does on one process: its tensors are the model's own full weights."""
    model, heads, _ = sliced("llama")
    train(model, optimizer_of(model, heads), [[tokens(1)]])
    other, _, _ = sliced("llama")
    state = model.state_dict()
    for name, value in other.state_dict().items():
        state[name].copy_(value)
    model.load_state_dict(state)
    assert differences(model.state_dict(), other.state_dict()) == []
    assert torch.equal(loss_of(model, tokens(2)), loss_of(other, tokens(2)))


@pytest.mark.parametrize("described", [True, False], ids=["whole", "as DCP keeps it"])
def test_a_state_of_other_heads_is_refused_though_its_leaves_are_as_large(described):
    model, heads, _ = sliced("llama")
    optimizer = optimizer_of(model, heads)
    train(model, optimizer, [[tokens(1)]])
    saved = optimizer.state_dict()
    if not described:
        del saved["alps"]
    other = model_of("llama")
    moved = alps.HeadSelection([(0, 2), (2, 1), (2, 3)], heads.heads_per_layer, parts=heads.parts)
    optimizer = alps.HeadAdamW(other.parameters(), heads=alps.slice_heads(other, moved))
    with pytest.raises(ValueError, match="another selection.*q_proj.weight_slice"):
        optimizer.load_state_dict(saved)
    again, heads, _ = sliced("llama")
    optimizer = optimizer_of(again, heads)
    optimizer.load_state_dict(saved)
    assert len(optimizer.state) == len(saved["state"]) > 0
