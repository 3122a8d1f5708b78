"""The CPU backend of `head_adamw_` writes what the oracle writes, bit for bit, in every precision."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from alps_kernels.ops import GradControl, HyperRow, HyperTable
from alps_kernels.ops.adamw import cpu, oracle
from alps_kernels.optim.groups import slot_of
from alps_kernels.selection import BoundParam
from tests.optim.cases import sliced_module

PRECISIONS = [(dtype, master, moments) for dtype, masters in (
    (torch.float64, [None]), (torch.float32, [None]), (torch.bfloat16, [None, "split", "kahan", "stochastic"]),
    (torch.float16, [None, "split", "kahan", "stochastic"])) for master in masters
    for moments in (torch.float32, torch.bfloat16, "8bit") if dtype != torch.float64 or moments == torch.float32]
AGES = 3.0, 7.0


def case(dtype, master, moments, amsgrad, maximize):
    """(updates, their hyperparameters, every tensor): rows, columns of two ages, a bias, and leaves with their weights."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))  # noqa: E731
    leaves = [sliced_module(draw(24, 20).detach(), dim, ((1, 6), (10, 17))) for dim in (0, 1)]
    parts = [(BoundParam("rows", draw(24, 20), 0, ((0, 7), (15, 24))), None),
             (BoundParam("cols", draw(24, 20), 1, ((2, 8), (9, 20))), ((2, 5), (5, 8), (9, 20))),
             (BoundParam("bias", draw(24), 0, ((0, 24),)), None),
             (BoundParam("of several ages", draw(6, 4, 5), 0, ((0, 6),)), ((0, 2), (2, 6))),
             *((BoundParam("leaf", m.weight_slice, 0, ((0, m.weight_slice.shape[0]),)), None) for m in leaves)]
    options = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, maximize=maximize, master=master,
                   moment_dtype=moments)
    rows, updates, tensors = [HyperRow.of(options, age) for age in (*AGES, AGES[0])], [], [m.weight for m in leaves]
    for stream, (part, spans) in enumerate(parts):
        slot = slot_of(part, stream, options)
        slot = slot if spans is None else replace(slot, spans=spans)
        part.param.grad = torch.randn(part.param.shape, generator=generator).to(dtype)
        state = slot.new_state(amsgrad=amsgrad, device_step=False)
        state["step"] = slot.step_tensor(list(AGES if spans is None else (*AGES, AGES[0]))[:len(spans or [1])], False)
        updates.append(slot.update(state, amsgrad))
        updates[-1].step = state["step"]
        tensors += [part.param, part.param.grad, *state.values()]
    return updates, HyperTable(rows), tensors


@pytest.mark.parametrize("pending", [0, 2**20], ids=["each parameter by itself", "together"])
@pytest.mark.parametrize("dtype, master, moments", PRECISIONS, ids=str)
def test_the_cpu_backend_is_the_oracle(dtype, master, moments, pending, monkeypatch):
    monkeypatch.setattr(cpu, "PENDING", pending)
    for amsgrad, maximize in product((False, True) if moments != "8bit" else (False,), (False, True)):
        for scale, skip in ((None, None), (1.0, 0.0), (2.7, 0.0), (1.0, 1.0)):
            control = GradControl() if scale is None else GradControl(torch.tensor(scale), found_inf=torch.tensor(skip))
            sides = []
            for step in (oracle.head_adamw_, cpu.head_adamw_):
                updates, hypers, tensors = case(dtype, master, moments, amsgrad, maximize)
                start = [t.detach().clone() for t in tensors]
                for _ in range(2):
                    step(updates, hypers, control=control, seed=5)
                sides.append(tensors)
            assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True)), (amsgrad, maximize, scale, skip)
            still = [torch.equal(a, b) for a, b in zip(start, tensors, strict=True)]
            assert all(still) if skip else not all(still) and still.count(True) == 6, "only gradients"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_their_norms_agree(dtype):
    updates, _, _ = case(dtype, None, torch.float32, False, False)
    norm = oracle.head_grad_norm(updates)
    torch.testing.assert_close(cpu.head_grad_norm(updates), norm, rtol=1e-6, atol=0)
    selected = [u.grad if block is None else block.of(u.grad) for u in updates for block in u.blocks or (None,)]
    torch.testing.assert_close(norm, torch.cat([g.reshape(-1).double() for g in selected]).norm(), rtol=1e-12, atol=0)
    assert cpu.head_grad_norm([]) == oracle.head_grad_norm([]) == 0
