"""HeadAdamW inside a Trainer: found behind wrappers, resumed with the selection of the state that it loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import join_master
from ..optim import LOW, HeadAdamW
from ..selection import BoundParam, BoundSelection
from ..tensors import merge


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    while not isinstance(optimizer, HeadAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def refuse_sharded(args: Any) -> None:
    """Raises ValueError where the Trainer would replace the parameters that a selection is bound to."""
    plugins = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    for what, variable in plugins.items():
        if getattr(args, what, None) or os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(f"the Trainer shards the model ({what}), which replaces the parameters that the heads are "
                             "bound to; train on one device or with DDP")


class FollowingHeadAdamW(HeadAdamW):
    """HeadAdamW that takes up, before its first step, the narrower selection of a state it loads.

    A run that narrowed its selection on the way resumes narrowed: a Trainer loads the state
    before any callback could say so.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, narrower = self.heads, None if self.state else self._narrower(state_dict)
        if narrower is None:
            return super().load_state_dict(state_dict)
        self.set_heads(narrower)
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.set_heads(before)
            raise

    def _narrower(self, saved: Any) -> BoundSelection | None:
        """The selection of the state, where it is another one and lies in what trains here, else None."""
        ours = {param: slot.part for param, slot in self._slots.items()}
        theirs: list[BoundParam] = []
        try:
            described = saved["alps"]["params"]
            for index, param in enumerate(p for group in self.param_groups for p in group["params"]):
                if entry := described.get(index):
                    part = BoundParam(entry["name"], param, entry["dim"], tuple((a, b) for a, b in entry["ranges"]))
                    if list(param.shape) != entry["shape"] or not _within(part, ours[param]):
                        return None
                    theirs.append(part)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # `super` says what is wrong
        same = len(theirs) == len(ours) and all(part.ranges == ours[part.param].ranges for part in theirs)
        return None if same or len(theirs) != len(described) else BoundSelection(None, tuple(theirs), "frozen", None)


def _within(part: BoundParam, outer: BoundParam) -> bool:
    return outer.full or (part.dim == outer.dim and merge((*part.ranges, *outer.ranges)) == outer.ranges)


@torch.no_grad()
def masters(optimizer: HeadAdamW, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The float32 masters of the 16-bit parameters among `names`, where the optimizer's state holds them."""
    found = {}
    for part in optimizer.heads.params:
        state = optimizer.state.get(part.param, {})
        low = next((state[key] for key in LOW if key in state), None)
        if low is not None and part.name in names:
            dense = torch.zeros(part.param.shape, dtype=low.dtype, device=low.device)
            part.spread(low.reshape(-1), dense)
            found[part.name] = join_master(part.param.detach(), dense)
    return found
