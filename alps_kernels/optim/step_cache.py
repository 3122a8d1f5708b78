"""Step cache: the arguments of a step, kept for the next, and the quick check that they are still valid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ..ops import DeviceHypers, GradControl, HyperRow, HyperTable, Launches, ParamUpdate, capturing, counted, head_grad_norm
from ..tensors import SyncedSlice, sum_of_squares, synced_slice_of, written_together
from .state import Slot, check_grad, check_state
from .watched_state import Changes, ParamState, StateTable

try:  # what guards compiled code looks at every tensor in C++, at 45 ns each
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private to torch: it may go
    TensorGuards = None

ADDRESS = Tensor.data_ptr
NOTHING = GradControl()  # gradients are taken as they are
ONE = torch.ones((), dtype=torch.float32, device="cpu")  # a number would take three times as long to add


class StepCache:
    """What a step takes, of the parameters that have a gradient in it.

    Args:
        groups, slots, state: the optimizer's.

    Raises:
        RuntimeError, ValueError: a gradient or a state does not fit its parameter; it is named.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], slots: Mapping[Tensor, Slot],
                 state: Mapping[Tensor, dict]) -> None:
        updates, of_groups = [], []
        self.changes = state.changes if type(state) is StateTable else Changes()
        self.updates: list[ParamUpdate] = updates
        self.states: list[ParamState] = []  # `step` included
        self.absent: list[Tensor] = []  # parameters that train and have no gradient
        self.fresh: list[Tensor] = []  # those that had no state before
        for group in groups:
            for param in group["params"]:
                if (slot := slots.get(param)) is None:
                    continue
                if param.grad is None:
                    self.absent.append(param)
                    continue
                check_grad(slot)
                if not (entry := state.get(param)):
                    entry = slot.new_state(amsgrad=group["amsgrad"], device_step=group["capturable"])
                    self.fresh.append(param)
                check_state(slot, entry, group["amsgrad"])
                updates.append(slot.update(entry, group["amsgrad"], group["capturable"]))
                self.states.append(ParamState.of(entry, self.changes))
                of_groups.append(group)
        self.params = [update.owner for update in updates]
        copied = [u for u in updates if u.weight_copy is not None]
        self.leaves, self.copies = [u.param for u in copied], [u.weight_copy for u in copied]
        self.slices = [synced_slice_of(leaf) for leaf in self.leaves]
        self.addresses = list(zip(map(ADDRESS, self.leaves), map(ADDRESS, self.copies), strict=True))
        self.adopted = SyncedSlice.adopted
        self.fixed = [*(u.param for u in updates), *self.copies]
        self.pointers = list(map(Tensor.data_ptr, self.fixed)), [u.grad.data_ptr() for u in updates]
        self.shape_of_grads = _Likeness([u.grad for u in updates])
        self.held = True  # the updates hold gradients
        self.counts: Tensor | None = None  # of the host, one after the other
        self.version: int | None = None
        self.known: tuple = (None, None, [])
        self.others: list[Tensor] = []  # leaves whose full weight the step does not write
        self.aged: list[tuple[dict[str, Any], float]] = []  # group and steps taken of every row of hyperparameters
        self.on_device: list[tuple] = []  # group and states, group by group and device by device
        self.device_hypers: list[DeviceHypers] = []  # of them
        self._assign_rows(of_groups)

    def _assign_rows(self, groups: Sequence[dict[str, Any]]) -> None:
        """Give every parameter its rows of hyperparameters: on the host those of one group and age share theirs."""
        ages: dict[tuple, int] = {}
        on_device: dict[tuple, list[tuple]] = defaultdict(list)
        for update, state, group in zip(self.updates, self.states, groups, strict=True):
            if update.counts_on_device:
                on_device[update.param.device, id(group)].append((group, state, update))
                continue
            key = id(group), *state["step"].reshape(-1).tolist()
            if key not in ages:
                ages[key] = len(self.aged)
                self.aged += [(group, age) for age in key[1:]]
            update.row = ages[key]
        at: dict[torch.device, int] = {}
        for (device, _), members in on_device.items():
            self.on_device.append((members[0][0], [state for _, state, _ in members]))
            for *_, update in members:
                update.row = at.get(device, 0)
                at[device] = update.row + update.n_rows

    def settle(self, groups: Sequence[Mapping], state: StateTable) -> None:
        """The states are the optimizer's from now on; counts of one place become views of one tensor.

        Raises:
            RuntimeError: a CUDA graph is captured, in which no state can be made; nothing has changed.
        """
        captured = capturing(self.updates[0].param.device)
        if captured and self.fresh:
            raise RuntimeError("HeadAdamW.step is captured in a CUDA graph and never ran outside of a capture with"
                               " gradients for these very parameters: take one step that is not captured first")
        for param, entry in zip(self.params, self.states, strict=True):
            if state.get(param) is not entry:
                state[param] = entry
        host = [s for s, update in zip(self.states, self.updates, strict=True) if not update.counts_on_device]
        if host:
            self.counts = _joined(host)
            self.version = self.counts._version
        self.device_hypers = []
        for group, members in self.on_device:
            # A graph may hold counts that are joined: they stay where they are, whatever else has a gradient.
            alone = all([entry["step"]._base is None for entry in members])
            counts = _joined(members) if alone and not captured else _base(members)
            self.device_hypers.append(DeviceHypers(group, [entry["step"] for entry in members], counts))
        for entry, update in zip(self.states, self.updates, strict=True):
            update.step = entry["step"]
        copied = set(map(id, self.leaves))
        self.others = [p for g in groups for p in g["params"] if id(p) not in copied and synced_slice_of(p) is not None]
        if type(state) is StateTable and not any(update.sharded for update in self.updates):
            # of shards more may change than is looked at
            self.known = self.changes.count, state, [(g, list(g["params"]), g["amsgrad"]) for g in groups]
            # Whoever moves a state (`t.data = t.data.to(...)`) moves all of it: some of it tells.
            self.sample = [t for entry in (self.states[0], self.states[-1]) for t in entry.values()]
            self.sampled = list(map(ADDRESS, self.sample))

    def hold(self, groups: Sequence[Mapping], state: Mapping[Tensor, dict]) -> list[Tensor] | None:
        """The gradients of these parameters, where nothing but their place in memory can have changed."""
        changes, table, listed = self.known
        if (changes != self.changes.count or table is not state or len(listed) != len(groups)
                or (self.counts is not None and self.counts._version != self.version)):
            return None
        for group, (known, params, amsgrad) in zip(groups, listed, strict=True):
            now = group["params"]
            if (group is not known or len(now) != len(params) or not all(map(is_, now, params))
                    or group["amsgrad"] != amsgrad):
                return None
        if list(map(ADDRESS, self.sample)) != self.sampled:
            return None
        grads = [p.grad for p in self.params]
        if not self.shape_of_grads.same(grads) or (self.absent and any([p.grad is not None for p in self.absent])):
            return None
        if self.adopted != SyncedSlice.adopted or not all(
                map(is_, [one.module._parameters.get(one.name) for one in self.slices], self.copies)):
            return None
        return grads if list(map(ADDRESS, self.fixed)) == self.pointers[0] else None

    def moved(self, grads: list[Tensor]) -> bool:
        """A gradient lies elsewhere than at the last step."""
        fixed, before = self.pointers
        now = list(map(ADDRESS, grads))
        if now == before:
            return False
        self.pointers = fixed, now
        return True

    def take(self, grads: Sequence[Tensor]) -> None:
        for update, grad in zip(self.updates, grads, strict=True):
            update.grad = grad
        self.held = True

    def release(self) -> None:
        """Forget the gradients."""
        if self.held:
            for update in self.updates:
                update.grad = None
            self.held = False

    def hypers(self) -> HyperTable:
        """Of the step to come."""
        tables: dict[torch.device, list[Tensor]] = {}
        for hypers in self.device_hypers:
            tables.setdefault(hypers.steps[0].device, []).append(hypers.rows())
        return HyperTable([HyperRow.of(group, age + 1) for group, age in self.aged],
                          {device: rows[0] if len(rows) == 1 else torch.cat(rows) for device, rows in tables.items()})

    def control(self, hypers: HyperTable, grad_scale: Tensor | float | None, found_inf: Tensor | None,
                max_norm: float | None, **how: Any) -> GradControl:
        """How gradients are unscaled and clipped; `how`: what `head_grad_norm` takes too."""
        if grad_scale is not None and not isinstance(grad_scale, Tensor):
            grad_scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=self.updates[0].param.device)
        if max_norm is not None:
            return GradControl(grad_scale, self.grad_norm(hypers, grad_scale, **how), max_norm, found_inf)
        return NOTHING if grad_scale is None and found_inf is None else GradControl(grad_scale, found_inf=found_inf)

    def grad_norm(self, hypers: HyperTable, grad_scale: Tensor | None, seed: int, launches: Launches,
                  backend: str | None) -> Tensor:
        """The l2 norm of the unscaled gradients of what trains, over the shards of all ranks; `hypers` of this step."""
        updates = self.updates
        options = {"grad_scale": grad_scale, "seed": seed, "backend": backend}
        if not any([update.sharded for update in updates]):
            return head_grad_norm(updates, hypers, launches=launches, **options)

        def square(members: list[int]) -> Tensor:
            if len(members) == len(updates):
                return head_grad_norm(updates, hypers, launches=launches, **options).square()
            return head_grad_norm([updates[i] for i in members], **options).square()

        return sum_of_squares(self.params, square).sqrt()

    def count(self, found_inf: Tensor | None, plain: Sequence[ParamUpdate]) -> None:
        """The step was taken.

        Args:
            found_inf: where all count on their device, whether it was not.
            plain: those whose count was advanced with their weights.
        """
        if not plain:
            if self.counts is not None:
                self.counts.add_(ONE)
            for hypers in self.device_hypers:
                hypers.count(found_inf)
        elif len(plain) < len(self.updates):
            done = set(map(id, plain))
            steps = [update.step for update in self.updates if id(update) not in done]
            torch._foreach_add_(steps, counted(found_inf, steps[0]))
        if self.slices and found_inf is None:  # else only the device knows whether they were written
            written_together(self.slices, self.leaves, self.copies, self.addresses)
        self.aged = [(group, age + 1) for group, age in self.aged]
        if self.fresh:
            self.fresh = []
        if self.counts is not None:  # last: an interrupt on the way here makes the next step look at everything
            self.version = self.counts._version

    def undo(self, state: dict[Tensor, dict]) -> None:
        """The step failed: what did not move keeps no state."""
        for param in self.fresh:
            if param in state and not state[param]["step"].any():
                del state[param]


def _joined(states: Sequence[ParamState]) -> Tensor:
    """The step counts of states, which become views of it."""
    if (counts := _base(states)) is not None:
        return counts
    steps = [state["step"] for state in states]
    counts, at = torch.cat([step.reshape(-1).float() for step in steps]), 0
    for state, step in zip(states, steps, strict=True):
        state["step"] = counts[at:at + step.numel()].view(step.shape)
        at += step.numel()
    return counts


def _base(states: Sequence[ParamState]) -> Tensor | None:
    """The tensor whose views the step counts are, one after the other; None where there is none."""
    base, at = states[0]["step"]._base, 0
    for state in states:
        step = state["step"]
        if (base is None or step._base is not base or step.storage_offset() != at or not step.is_contiguous()
                or step.data_ptr() != base.data_ptr() + 4 * at):  # `step.data` may have been given other memory
            return None
        at += step.numel()
    return base if base.ndim == 1 and base.numel() == at and base.dtype == torch.float32 else None


class _Likeness:
    """Dtype, device, shape, strides and layout of tensors, to compare others with."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.guards = self.facts = None
        try:
            self.guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        except TypeError:  # there is none, or it takes something else
            self.facts = self._of(tensors)

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        if self.guards is not None:
            return self.guards.check(*tensors)
        return not any(t is None for t in tensors) and self._of(tensors) == self.facts

    @staticmethod
    def _of(tensors: Sequence[Tensor]) -> list[tuple]:
        return [(t.layout, t.dtype, t.device, t.shape, t.stride() if t.layout == torch.strided else ())
                for t in tensors]
