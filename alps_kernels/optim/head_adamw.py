"""HeadAdamW: AdamW on the selected slices of a model's parameters, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..ops import Launches, Update, head_adamw_, head_grad_norm
from ..selection import BoundSelection
from ..tensors import like, sum_of_squares
from .checks import Cautions
from .replaced import Known, replaced
from .state import (
    EIGHT,
    MOMENTS,
    SCALE,
    Slot,
    check_grad,
    check_overlaps,
    check_param,
    check_state,
    checked_precision,
    regrown,
    slot_of,
    whole,
)
from .state_dict import FORMAT, VERSION, read_saved, saved_entry
from .step_cache import Arguments, ParamState, mirrored

OURS = ("master", "moment_dtype")  # entries of a param group that torch.optim.AdamW does not have


class HeadAdamW(torch.optim.Optimizer):
    """AdamW that moves the selected attention heads and leaves every other byte alone.

    The arguments of `torch.optim.AdamW` in torch's order; then, by keyword, those below.
    `foreach` and `fused` are accepted and change nothing: there is one implementation per
    device. `differentiable` is refused.

    Args:
        heads: what trains of `params` (`HeadSelection.bind(model)`). Parameters it does not
            list never move and have no state, whatever their gradient; of those it lists in
            part, only the selected slices move, have state, and have their gradient read.
            None: every parameter trains, a plain AdamW.
        master: how 16-bit parameters keep what 16 bits cannot. "split": an exact float32
            master, its lower half in the state (2 bytes an element); "kahan": a compensation
            in the parameter's dtype (2 bytes); "stochastic": stochastic rounding (0 bytes);
            None: round to nearest, which loses most updates at fine-tuning learning rates.
            Wider parameters need none of it. May differ between param groups.
        moment_dtype: torch.float32; torch.bfloat16 with stochastic rounding (to nearest,
            `exp_avg_sq` would stall at beta2 = 0.999); or "8bit", codes of the fourth root with
            a float32 scale for each 64 elements (2.125 bytes an element for both moments; error
            bounds in `ops.reference_codes`; not with amsgrad). float64 parameters keep float64.
        max_grad_norm: clip the global l2 norm of the gradients, over the selected slices
            alone, to this; `grad_norm` then holds the last norm before clipping.
        seed: of stochastic rounding; let it be the same on every replica. Of sharded parameters the
            random bits depend on the number of ranks; every other precision does not.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` (amsgrad), `master_lo`
    or `kahan`, and `exp_avg_scale` and `exp_avg_sq_scale` (8-bit moments). Its tensors have the
    parameter's shape where all of it trains, else they are compact: 1-D, in the order of
    `BoundParam.cut`.

    A step of a sliced leaf (`slice_heads`) writes the new values into the full weight too.

    A GradScaler looks for infinities in whole gradients before it hands over to `step`, frozen
    elements included; everything in here reads the selected ones alone.

    Raises:
        ValueError, TypeError, RuntimeError: as torch.optim.AdamW does for its own arguments;
            ValueError for ours, and for parameters that cannot be trained here.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf
    _backend: str | None = None  # of `head_adamw_`; tests set it

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        heads: BoundSelection | None = None,
        master: str | None = "split",
        moment_dtype: torch.dtype | str = torch.float32,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        # torch itself says what is wrong with its arguments, and what their defaults are.
        plain = torch.optim.AdamW([torch.zeros(1)], lr, betas, eps, weight_decay, amsgrad, maximize=maximize,
                                  foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused)
        if heads is not None and not isinstance(heads, BoundSelection):
            raise TypeError(f"heads is a {type(heads).__name__}; expected what HeadSelection.bind(model) returns")
        if max_grad_norm is not None and (isinstance(max_grad_norm, bool) or not isinstance(max_grad_norm, (int, float))
                                          or not max_grad_norm > 0):
            raise ValueError(f"max_grad_norm is {max_grad_norm!r}; expected a positive number or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
        self.heads, self.max_grad_norm, self.seed = heads, max_grad_norm, seed
        self.grad_norm: Tensor | None = None
        self._launches, self._arguments = Launches(), None  # tables and arguments of the last step, for the next
        super().__init__(params, {**plain.defaults, "master": master, "moment_dtype": moment_dtype})
        self._slots: dict[Tensor, Slot] = self._make_slots(heads)
        self._params = Known(self._indices())
        self._cautions: Cautions | None = Cautions(self._slots.values())

    # -- what trains -------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. With a selection, what it does not list stays frozen."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            if "_slots" in self.__dict__:  # else under construction, group by group
                self._slots = {**self._make_slots(self.heads), **self._slots}
                self._params = Known(self._indices())
        except (ValueError, TypeError):
            del self.param_groups[before:]
            raise

    def set_heads(self, heads: BoundSelection | None) -> None:
        """Train another selection from the next step on.

        Elements of both selections keep their moments and step count. Elements that join start
        with empty moments and a step count of their own, so that their bias correction is that
        of a fresh AdamW. What leaves loses its state (with "split" and "kahan" also what 16
        bits do not hold); its weights stay as they are.

        Raises:
            ValueError, TypeError: as the constructor; nothing has changed then.
        """
        if heads is not None and not isinstance(heads, BoundSelection):
            raise TypeError(f"heads is a {type(heads).__name__}; expected what HeadSelection.bind(model) returns")
        slots, states = self._make_slots(heads), {}
        for param, state in self.state.items():
            if state and param in slots:
                slots[param], states[param] = regrown(self._slots[param], slots[param], state)
        with self._all_or_nothing():
            for param in [p for p in self.state if p not in states]:
                del self.state[param]
            self.state.update(states)
            self.heads, self._slots, self._arguments, self._params = heads, slots, None, Known(self._indices())
            self._launches = self._launches.for_others()
            self._cautions = Cautions(slots.values(), again=True)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """An error or interrupt within leaves groups, state and selection as they were."""
        before, state = dict(self.__dict__), dict(self.state)
        try:
            yield
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            self.state.clear()
            self.state.update(state)
            raise

    def _make_slots(self, heads: BoundSelection | None) -> dict[Tensor, Slot]:
        chosen = None if heads is None else {id(part.param): part for part in heads.params}
        slots: dict[Tensor, Slot] = {}
        stream, everything = 0, []
        for index, group in enumerate(self.param_groups):
            checked_precision(f"param group {index}", group)
            if group["differentiable"]:
                raise ValueError("HeadAdamW is not differentiable: its step writes in place; pass differentiable=False")
            names = group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]
            for name, param in zip(names, group["params"], strict=True):
                everything.append((name if chosen is None or id(param) not in chosen else chosen[id(param)].name, param))
                part = whole(name, param) if chosen is None else chosen.pop(id(param), None)
                if part is not None:
                    check_param(part)
                    slots[param] = slot_of(part, stream, group)
                stream += 1
        if chosen:
            lost = next(iter(chosen.values()))
            raise ValueError(f"{lost.name} holds selected slices but is not among the optimizer's params"
                             f" ({len(chosen)} such); pass model.parameters() of the model that was bound,"
                             " and bind it again after fully_shard, which replaces parameters")
        check_overlaps(everything, slots)
        return slots

    def _follow(self) -> None:
        """Train the parameters that were put in the place of those that trained."""
        gone, heads = replaced(list(self._indices()), self._params, self._slots, self.heads, self.state)
        if gone:
            kept = {param: slot for param, slot in self._slots.items() if param not in gone}
            self._slots, self.heads, self._params = {**self._make_slots(heads), **kept}, heads, Known(self._indices())

    # -- the step ----------------------------------------------------------------------------

    @torch._disable_dynamo  # a compiled training step breaks its graph here, as at the steps of torch's own optimizers
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Checks everything before the first write.

        Inside a compiled function it runs as it is, between compiled parts. `fullgraph=True` is
        not to be had: `zero_grad`, and the wrapper that torch puts around every optimizer's
        `step`, are not traced (torch 2.13), torch's AdamW included.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a gradient or a state does not fit its parameter; it names it.
        """
        # torch renamed its check of capturable groups under graph capture
        name = "_accelerator_graph_capture_health_check"
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        arguments = self._ready()
        try:
            if self._cautions is not None and not self._cautions.before_step(self.param_groups, self.state,
                                                                             bool(arguments.updates)):
                self._cautions = None
            self._apply(arguments)
        finally:
            arguments.release()  # so that `zero_grad` frees their memory
        return loss

    def _ready(self) -> Arguments:
        """What the step takes, checked: that of the last step where it holds."""
        kept = self._arguments
        if kept is not None and (grads := kept.hold(self.param_groups, self.state)) is not None:
            moved = kept.moved(grads)
            if moved is not None:
                if moved:
                    self._launches.moved(kept.pointers[1])
                if self._launches.outdated:
                    kept.take(grads)
                return kept
        self._follow()
        updates, states, groups, absent = [], [], [], []
        for group in self.param_groups:
            for param in group["params"]:
                if (slot := self._slots.get(param)) is None:
                    continue
                if param.grad is None:
                    absent.append(param)
                    continue
                state, update = self._update(group, slot)
                updates.append(update)
                states.append(state)
                groups.append(group)
        self._arguments = None
        self._launches.moved()
        return Arguments(updates, states, groups, absent)

    def _update(self, group: dict[str, Any], slot: Slot) -> tuple[ParamState, Update]:
        """The state of one parameter and what the op takes of it, checked."""
        check_grad(slot)
        state = self.state.get(slot.param) or slot.new_state(amsgrad=group["amsgrad"], device_step=group["capturable"])
        check_state(slot, state, group["amsgrad"])
        n_rows, mirror = state["step"].numel(), mirrored(slot.param) if slot.mirrored else None
        plain = slot.part.full and n_rows == 1 and mirror is None
        update = Update(
            slot.name, slot.param, slot.param.grad, None if plain else slot.blocks, state["exp_avg"],
            state["exp_avg_sq"], state["max_exp_avg_sq"] if group["amsgrad"] else None,
            state[slot.low_key] if slot.low_key else None, slot.master, slot.stream, n_rows=n_rows,
            counts_on_device=state["step"].device.type != "cpu", mirror=mirror,
            scales=(state["exp_avg" + SCALE], state["exp_avg_sq" + SCALE]) if slot.moment_dtype == EIGHT else None)
        return state if type(state) is ParamState else ParamState(state), update

    def _apply(self, arguments: Arguments) -> None:
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and not arguments.all_on_device:
            if float(found_inf) != 0:
                return
            found_inf = None  # else it stays on the device, and decides there
        if not (updates := arguments.updates):
            return
        control = self._control(updates, found_inf)
        fresh = [] if arguments is self._arguments else [u for u in updates if not self.state.get(u.owner)]
        try:
            if arguments is not self._arguments:
                for update, state in zip(updates, arguments.states, strict=True):
                    self.state[update.owner] = state
                arguments.settle(self.param_groups, self.state)
                self._arguments = arguments
            head_adamw_(updates, arguments.numbers(), control=control, seed=self.seed, launches=self._launches,
                        backend=self._backend)
        except BaseException:  # an interrupt too: what did not move keeps no state
            self._arguments = None
            for update in fresh:
                if update.owner in self.state and not self.state[update.owner]["step"].any():
                    del self.state[update.owner]
            raise
        arguments.count(found_inf, self._launches.plain)

    def _control(self, updates: list[Update], found_inf: Tensor | None) -> Tensor | None:
        """[2] float32: the factor of every gradient (unscaling times clipping), and whether to skip."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and found_inf is None and self.max_grad_norm is None:
            return None
        device = updates[0].param.device
        factor = torch.ones((), dtype=torch.float64, device=device)
        if scale is not None:
            factor = factor / torch.as_tensor(scale, device=device).double().reshape(())
        if self.max_grad_norm is not None:
            self.grad_norm = self._norm(updates).to(device) * factor
            factor = factor * (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        skip = torch.zeros_like(factor) if found_inf is None else found_inf.to(factor).reshape(())
        return torch.stack([factor, skip]).float()

    def _norm(self, updates: list[Update]) -> Tensor:
        """Of the gradients of what trains, over the shards of all ranks."""
        if not any([update.sharded for update in updates]):
            return head_grad_norm(updates, seed=self.seed, launches=self._launches, backend=self._backend)

        def square(members: list[int]) -> Tensor:
            every = len(members) == len(updates)
            return head_grad_norm(updates if every else [updates[i] for i in members], seed=self.seed,
                                  launches=self._launches if every else None, backend=self._backend).square()

        return sum_of_squares([update.owner for update in updates], square).sqrt()

    # -- files -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under "alps" what trains, so that it is refused where it does not fit.

        `torch.optim.AdamW` loads it where whole parameters train. The state of a partly selected
        parameter names its slices once more, since `torch.distributed.checkpoint` keeps nothing
        but "state" and "param_groups"; `master_lo` is there in bytes, [..., 2], since no backend
        sends int16.

        Of sharded parameters that train in part it holds the compact state of all ranks, the same
        for any number of them: a collective, which every rank must call. State of parameters
        that train whole is sharded as they are.
        """
        self._follow()
        saved = super().state_dict()
        saved["state"] = {key: dict(entry) for key, entry in saved["state"].items()}
        index = self._indices()
        saved["state"].update({index[param]: saved_entry(slot, self.state[param]) for param, slot in self._slots.items()
                               if self.state.get(param)})
        for group in saved["param_groups"]:  # torch's gathering of state dicts knows no dtypes
            group["moment_dtype"] = str(group["moment_dtype"]).removeprefix("torch.")
        saved["alps"] = {"format": FORMAT, "version": VERSION, "seed": self.seed,
                         "params": {index[param]: slot.describe() for param, slot in self._slots.items()}}
        return saved

    def dense_state_dict(self) -> dict[str, Any]:
        """A state dict for `torch.optim.AdamW` on the same params: zero moments where nothing trains.

        Where elements of one parameter differ in age it has the step count of the oldest.
        """
        self._follow()
        saved = super().state_dict()
        slots = {index: self._slots[param] for param, index in self._indices().items() if param in self._slots}
        state = {index: {key: value.max() if key == "step" else like(slots[index].param, slots[index].spread(value))
                         for key, value in slots[index].decoded(entry).items() if key == "step" or key in MOMENTS}
                 for index, entry in saved["state"].items()}
        groups = [{key: value for key, value in group.items() if key not in OURS} for group in saved["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of torch.optim.AdamW returned, in its dtypes.

        A dense state of a partly selected parameter is cut. Nothing is changed where it fails.

        Raises:
            ValueError: it is of another selection, precision or model; the difference is named.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"the state dict is a {type(state_dict).__name__}; expected what state_dict() returns")
        self._follow()
        read: dict[str, Any] = {}

        def take(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            read.update(read_saved(saved, self.param_groups, self._slots, self.seed))
            groups = [{**theirs, **{key: ours[key] for key in OURS}}
                      for theirs, ours in zip(saved["param_groups"], self.param_groups, strict=False)]
            # Without the state: torch would cast every tensor of it to the parameter's dtype.
            return {**saved, "state": {}, "param_groups": groups if read else saved["param_groups"]}

        hooks = dict(self._optimizer_load_state_dict_pre_hooks)
        with self._all_or_nothing():
            try:
                self.register_load_state_dict_pre_hook(take)  # the last to run: it sees what others made
                self._incoming = read
                super().load_state_dict(state_dict)
            finally:
                self._optimizer_load_state_dict_pre_hooks.clear()
                self._optimizer_load_state_dict_pre_hooks.update(hooks)
                self.__dict__.pop("_incoming", None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_cautions", None)
        self._launches, self._arguments = self.__dict__.get("_launches", Launches()).for_others(), None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self.__dict__.setdefault("_params", Known(self._indices()))
        if incoming := self.__dict__.get("_incoming"):
            self._slots, self.seed = incoming["slots"], incoming["seed"]
            self.state.update(incoming["states"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "heads": self.heads, "max_grad_norm": self.max_grad_norm,
                "seed": self.seed, "grad_norm": self.grad_norm, "_slots": self._slots}

    def _indices(self) -> dict[Tensor, int]:
        """Every parameter's number in a state dict: its position over all groups."""
        return {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}
