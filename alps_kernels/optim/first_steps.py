"""Warnings for likely mistakes, given in the first steps of an optimizer, each once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from ..tensors import first_of
from .state import EIGHT, HALVES, Slot

FIRST_STEPS = 3
SAMPLE = 4096  # elements of each parameter that are tried
LOST = 0.9  # the share of them that must stay where they are


class FirstStepChecks:
    """Watches the first steps of an optimizer. They alone look at values; the rest costs nothing.

    Args:
        slots: what trains.
        again: after another selection, of which precision and lr were spoken.
    """

    def __init__(self, slots: Iterable[Slot], *, again: bool = False) -> None:
        # the meta device, where steps are counted, has no values to look at
        self.slots, self.tried_lr = [slot for slot in slots if not slot.param.is_meta], again
        self.first: float | None = None  # the step count when this began
        self.idle = 0  # calls without any gradient
        rounded = [slot.name for slot in self.slots if slot.dtype in HALVES and slot.master is None and not again]
        if rounded:
            _warn(f"{first_of(rounded)} has 16 bits and no master (master=None): rounding to nearest loses most updates"
                  " at fine-tuning learning rates; master='split' keeps them")

    @torch.no_grad()
    def before_step(self, groups: Iterable[dict], state: dict[Tensor, dict], reached: bool) -> bool:
        """Look at the weights and at the steps that were taken, before a step writes; whether there is more to watch.

        Args:
            reached: some of what trains has a gradient.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return True
        count = max((entry["step"].max().item() for slot in self.slots if (entry := state.get(slot.param))),
                    default=0.0)
        self.first = count if self.first is None else self.first
        self.idle += not reached
        if not self.tried_lr and (lrs := {id(p): float(g["lr"]) for g in groups for p in g["params"]
                                          if float(g["lr"]) > 0}):
            self.tried_lr = True
            self._try_lr(lrs)
        if max(count - self.first, self.idle - 1) < FIRST_STEPS:
            return True
        self._look_for_gradients(state)
        return False

    def _try_lr(self, lrs: dict[int, float]) -> None:
        """An update by AdamW is about lr: does adding it change anything?"""
        lost = []
        for slot in self.slots:
            lr, local = lrs.get(id(slot.param), 0.0), getattr(slot.param, "_local_tensor", slot.param)
            # 16 bits without a master have their own warning; Kahan and stochastic rounding lose nothing.
            if lr and slot.part.ranges and local.numel() and (slot.dtype not in HALVES or slot.master == "split"):
                values = local.detach().reshape(-1)[:SAMPLE]
                values = values.float() if slot.dtype in HALVES else values
                lost.append((slot.name, lr, (values + lr == values) & (values - lr == values)))
        if not lost:
            return
        shares = torch.stack([same.float().mean().to(lost[0][2].device) for *_, same in lost]).tolist()
        small = [(name, lr) for (name, lr, _), share in zip(lost, shares, strict=True) if share > LOST]
        if len(small) == len(lost):
            _warn(f"lr {small[0][1]:g} is so small that adding it to the weights changes next to none of them "
                  f"({first_of([name for name, _ in small])}): nothing will train")

    def _look_for_gradients(self, state: dict[Tensor, dict]) -> None:
        absent = [slot for slot in self.slots if not state.get(slot.param)]
        if frozen := [slot.name for slot in absent if not slot.param.requires_grad]:
            _warn(f"{first_of(frozen)} holds selected heads but requires_grad is False: it was frozen after the heads"
                  " were chosen and will not train")
        if unreached := [slot.name for slot in absent if slot.param.requires_grad and slot.param.numel()]:
            _warn(f"{first_of(unreached)} holds selected heads and had no gradient in {FIRST_STEPS} steps: the loss"
                  " does not depend on it, or it is not part of the model that runs")
        held = [(slot, local) for slot in self.slots if slot.moment_dtype != EIGHT and (entry := state.get(slot.param))
                and (local := getattr(entry["exp_avg"], "_local_tensor", entry["exp_avg"])).numel()]
        if held:
            moved = torch.stack([local.any().to(held[0][1].device) for _, local in held]).tolist()
            zeros = [slot.name for (slot, _), any_gradient in zip(held, moved, strict=True) if not any_gradient]
            if zeros:
                _warn(f"{first_of(zeros)} holds selected heads and its gradient was zero there in {FIRST_STEPS} steps:"
                      " the loss does not reach them")


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
