"""Accelerate prepares a sliced or frozen model and HeadAdamW for DDP and FSDP2: two ranks are one process."""

import os
from functools import partial

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.optim import groups
from alps_kernels.slicing import projection as sliced_projection
from alps_kernels.tensors import is_sharded
from tests.support import ranks

from ..slicing.test_sharded import OPTIONS, differences, loss_of, optimizer_of, sliced, tokens, train, whole_state
from ..support.mutants import check_plantable, plant
from ..support.sharded_cases import heads_of, model_of
from .cases import bind, selection, toy


def accelerator(**options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # the group is there
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def fsdp2(efficient):
    """Accelerate takes its FSDP2 path on GPUs alone; the CPU is told to be of that sort."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=efficient)
    made = accelerator(fsdp_plugin=plugin)
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    return made


def made(cut):
    """A model and its optimizer, sliced or not."""
    if cut:
        model, heads, _ = sliced("llama")
        return model, optimizer_of(model, heads)
    model = model_of("llama")
    return model, alps.HeadAdamW(model.parameters(), heads=heads_of("llama", model).freeze(model), **OPTIONS)


def run(prepare, cut, rank, world, folder):
    """Three steps, saved; a fourth; back to the saved state and the fourth again."""
    alone, optimizer = made(cut)
    train(alone, optimizer, [[tokens(s)] for s in range(4)])
    accelerate = prepare()
    model, optimizer = made(cut)
    wrapped, optimizer = accelerate.prepare(model, optimizer)

    def step(seed):
        accelerate.backward(loss_of(wrapped, tokens(seed)))
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(3):
        step(seed)
    accelerate.save_state(str(folder / "state"))
    accelerate.wait_for_everyone()
    step(3)
    problems = differences(whole_state(accelerate.unwrap_model(wrapped)), whole_state(alone))
    accelerate.load_state(str(folder / "state"))
    step(3)
    again = differences(whole_state(accelerate.unwrap_model(wrapped)), whole_state(alone))
    sharded = any(is_sharded(param) for param in wrapped.parameters())
    return problems + [f"resumed: {line}" for line in again] + ([] if sharded == (prepare is not accelerator) else ["not sharded"])


CHECKS = {
    "ddp": partial(run, accelerator, True), "ddp_frozen": partial(run, accelerator, False),
    "fsdp2": partial(run, partial(fsdp2, False), True), "fsdp2_frozen": partial(run, partial(fsdp2, False), False),
    "fsdp2_from_rank_0": partial(run, partial(fsdp2, True), True),
}
FAULTS = {
    "replaced parameters stay frozen": (groups, [("        found[old] = new\n", "        pass\n")], "fsdp2"),
    "leaves stay on the meta device": (sliced_projection, [("    if leaf.is_meta and not values.is_meta:", "    if False:")],
                                       "fsdp2_from_rank_0"),
}


def faulty(name, rank, world, folder):
    module, edits, check = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, module, *edits)
        return CHECKS[check](rank, world, folder)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks_are_one(check, tmp_path):
    pytest.importorskip("accelerate")
    assert ranks.run(2, {check: CHECKS[check]}, tmp_path)[check] == []


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tmp_path):
    pytest.importorskip("accelerate")
    module, edits, _ = FAULTS[name]
    check_plantable(module, *edits)
    assert ranks.run(2, {"faulty": partial(faulty, name)}, tmp_path, patience=10)["faulty"]


def put(optimizer, index, param):
    optimizer.param_groups[0]["params"][index] = param


def test_what_cannot_take_anothers_place_is_refused():
    params, bound = toy()
    optimizer = alps.HeadAdamW(list(params.values()), heads=bound)
    put(optimizer, 0, nn.Parameter(torch.zeros(5)))
    with pytest.raises(ValueError, match=r"rows \[48, 24\] was replaced in the optimizer by a parameter of shape \[5\]"):
        optimizer.step()
    put(optimizer, 0, params["rows"])
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    put(optimizer, 0, nn.Parameter(params["rows"].detach().clone()))
    with pytest.raises(ValueError, match="after its first step"):
        optimizer.step()


def test_replaced_parameters_train_their_own_slices():
    params, bound = toy()
    optimizer = alps.HeadAdamW(list(params.values()), heads=bound, **OPTIONS)
    others = {name: nn.Parameter(param.detach().clone()) for name, param in params.items()}
    for index, param in enumerate(others.values()):
        put(optimizer, index, param)
    for pair in (params, others):
        for param in pair.values():
            param.grad = torch.ones_like(param)
    optimizer.step()
    twin = alps.HeadAdamW(list(params.values()), heads=bound, **OPTIONS)
    twin.step()
    assert all(torch.equal(params[name], others[name]) for name in params)
    optimizer.set_heads(selection(others, rows=((0, 4),)))
    assert bind(*optimizer.heads.params).params[0].param is others["rows"]
