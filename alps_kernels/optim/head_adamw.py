"""HeadAdamW: AdamW on the selected slices of a model's parameters, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops import Launches, head_adamw_
from ..selection import BoundSelection
from ..tensors import check_type
from .first_steps import FirstStepChecks
from .groups import make_slots, regrown, replaced
from .state import Slot
from .state_dict import all_or_nothing, dense_state, read_saved, saved_state
from .step_cache import StepCache
from .step_hooks import after_step, check_capture, is_watched
from .watched_state import StateTable


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
            bounds in `ops/adamw/quantize8.py`; not with amsgrad). float64 parameters keep float64.
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
        one = torch.zeros(1, dtype=torch.float32, device="cpu")
        plain = torch.optim.AdamW([one], lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
                                  capturable=capturable, differentiable=differentiable, fused=fused)
        if max_grad_norm is not None and not (isinstance(max_grad_norm, (int, float)) and max_grad_norm > 0
                                              and not isinstance(max_grad_norm, bool)):
            raise ValueError(f"max_grad_norm is {max_grad_norm!r}; expected a positive number or None")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to 2**64 - 1")
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.grad_norm: Tensor | None = None
        self._launches, self._cache = Launches(), None  # tables and arguments of the last step, for the next
        super().__init__(params, {**plain.defaults, "master": master, "moment_dtype": moment_dtype})
        self.state = StateTable.of(self.state)
        self._train(heads, make_slots(self.param_groups, heads))
        self._first_steps: FirstStepChecks | None = FirstStepChecks(self._slots.values())

    def _train(self, heads: BoundSelection | None, slots: dict[Tensor, Slot]) -> None:
        self.heads, self._slots = heads, slots
        self._params = WeakTensorKeyDictionary(self._indices())  # for which slots were made; it keeps none alive

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. With a selection, what it does not list stays frozen."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            if "_slots" in self.__dict__:  # else under construction, group by group
                self._train(self.heads, {**make_slots(self.param_groups, self.heads), **self._slots})
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
        slots, states = make_slots(self.param_groups, heads), {}
        for param, state in self.state.items():
            if state and param in slots:
                slots[param], states[param] = regrown(self._slots[param], slots[param], state)
        with all_or_nothing(self):
            for param in [p for p in self.state if p not in states]:
                del self.state[param]
            self.state.update(states)
            self._train(heads, slots)
            self._launches, self._cache = self._launches.for_others(), None
            self._first_steps = FirstStepChecks(slots.values(), again=True)

    def _follow(self) -> None:
        """Train the parameters that were put in the place of those that trained."""
        gone, heads = replaced(list(self._indices()), self._params, self._slots, self.heads, self.state)
        if gone:
            kept = {param: slot for param, slot in self._slots.items() if param not in gone}
            self._train(heads, {**make_slots(self.param_groups, heads), **kept})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient. Checks everything before the first write.

        With `capturable` a CUDA graph may hold it: docs/cookbook.md. Inside a compiled function it runs as
        it is, between compiled parts; `fullgraph=True` takes no optimizer's step (torch 2.13).

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
            ValueError: a gradient or a state does not fit its parameter; it names it.
        """
        if torch.compiler.is_compiling() or is_watched(self):
            return self._hooked_step(*(() if closure is None else (closure,)))
        loss, cache = self._step(closure)
        after_step(self, None if cache is None else cache.others)
        return loss

    step.hooked = True  # torch wraps it else, at 7 us a step

    def _step(self, closure: Callable[[], Any] | None) -> tuple[Any, StepCache | None]:
        """The loss, and what was stepped, if anything was."""
        check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        cache = self._warm() or self._cold()
        try:
            if self._first_steps is not None and not self._first_steps.before_step(
                    self.param_groups, self.state, bool(cache.updates)):
                self._first_steps = None
            return loss, self._apply(cache)
        finally:
            cache.release()  # so that `zero_grad` frees their memory

    # Within a compiled function the graph breaks here, as at steps of torch's own optimizers.
    _hooked_step = torch._disable_dynamo(torch.optim.Optimizer.profile_hook_step(
        lambda self, closure=None: self._step(closure)[0]))

    def _warm(self) -> StepCache | None:
        """What the last step took, where it is still valid."""
        kept = self._cache
        if kept is None or (grads := kept.hold(self.param_groups, self.state)) is None:
            return None
        if kept.moved(grads):
            self._launches.moved(kept.pointers[1])
        if self._launches.outdated(self.seed, self._backend):
            kept.take(grads)
        return kept

    @torch.no_grad()
    def _cold(self) -> StepCache:
        """What the step takes, checked."""
        self._follow()
        cache = StepCache(self.param_groups, self._slots, self.state)
        self._cache = None
        self._launches.moved()
        return cache

    def _apply(self, cache: StepCache) -> StepCache | None:
        found_inf, updates = getattr(self, "found_inf", None), cache.updates
        if found_inf is not None and cache.aged:  # the host counts steps
            updates = updates if float(found_inf) == 0 else []
            found_inf = None  # else it stays on the device, and decides there
        if not updates:
            return None
        try:
            if cache is not self._cache:
                cache.settle(self.param_groups, self.state)
                self._cache = cache
            how = {"seed": self.seed, "launches": self._launches, "backend": self._backend}
            hypers = cache.hypers()
            control = cache.control(hypers, getattr(self, "grad_scale", None), found_inf, self.max_grad_norm, **how)
            self.grad_norm = self.grad_norm if control.norm is None else control.norm
            head_adamw_(updates, hypers, control=control, **how)
        except BaseException:  # an interrupt too
            self._cache = None
            cache.undo(self.state)
            raise
        cache.count(found_inf, self._launches.plain)
        return cache

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
        return saved_state(super().state_dict(), self._numbered_slots(), self.seed)

    def dense_state_dict(self) -> dict[str, Any]:
        """A state dict for `torch.optim.AdamW` on the same params: zero moments where nothing trains.

        Where elements of one parameter differ in age it has the step count of the oldest.
        """
        self._follow()
        return dense_state(super().state_dict(), self._numbered_slots())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of torch.optim.AdamW returned, in its dtypes.

        A dense state of a partly selected parameter is cut. Nothing is changed where it fails.

        Raises:
            ValueError: it is of another selection, precision or model; the difference is named.
        """
        check_type("the state dict", state_dict, dict, "what state_dict() returns")
        self._follow()

        def read(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            self._incoming, saved = read_saved(saved, self.param_groups, self._slots, self.seed)
            return saved

        hooks = self._optimizer_load_state_dict_pre_hooks
        with all_or_nothing(self):
            self._optimizer_load_state_dict_pre_hooks = {**hooks, None: read}  # it is given what the others made
            super().load_state_dict(state_dict)
            self._optimizer_load_state_dict_pre_hooks = hooks

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = StateTable.of(self.state)
        self.__dict__.setdefault("_first_steps", None)
        self._launches, self._cache = self.__dict__.get("_launches", Launches()).for_others(), None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self.__dict__.setdefault("_params", WeakTensorKeyDictionary(self._indices()))
        if incoming := self.__dict__.pop("_incoming", None):  # `load_state_dict` ends here
            self._slots, self.seed = incoming["slots"], incoming["seed"]
            self.state.update(incoming["states"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "heads": self.heads, "max_grad_norm": self.max_grad_norm,
                "seed": self.seed, "grad_norm": self.grad_norm, "_slots": self._slots}

    def _indices(self) -> dict[Tensor, int]:
        """Every parameter's number in a state dict: its position over all groups."""
        return {param: i for i, param in enumerate(p for group in self.param_groups for p in group["params"])}

    def _numbered_slots(self) -> dict[int, Slot]:
        return {index: self._slots[param] for param, index in self._indices().items() if param in self._slots}
