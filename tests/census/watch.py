"""Seeing what attention modules do: first calls, and what an output projection reads.

The smallest called module around a layer's parameters is run again on the inputs it had in a
real forward pass, with normalisations taken out (a norm over a whole query mixes heads).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

CHANGED, SAME = 2e-5, 5e-6  # of the largest value that the output projection reads
# What computes nothing on a CPU, and why.
UNRUNNABLE = {"MraSelfAttention": "its kernels need CUDA"}
# Parameters that let a value reach the other heads by design; zero while a layer is checked.
SILENCED = {"DogeAttention": "A"}  # the mask that doge derives from all values


@dataclasses.dataclass(frozen=True)
class Call:
    """The first call of a module in a forward pass."""

    args: tuple
    kwargs: dict


def _keep(value):
    """Containers that a model writes into are copied, tensors are not."""
    if type(value) is dict:
        return {k: _keep(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_keep(v) for v in value)
    if isinstance(value, Tensor) or isinstance(value, nn.Module):
        return value
    return copy.deepcopy(value)


class _Attends(torch.overrides.TorchFunctionMode):
    """Notes which module computes attention, and over how many heads."""

    def __init__(self, stack: list[nn.Module], found: dict[nn.Module, tuple]):
        super().__init__()
        self.stack, self.found = stack, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operand = args[0] if args else kwargs.get("query", kwargs.get("input"))
        if self.stack and isinstance(operand, Tensor):
            if name == "scaled_dot_product_attention":
                # With one query token, the heads of a group may stand in the place of tokens.
                heads, tokens = operand.shape[-3:-1] if operand.ndim >= 4 else (0, 0)
                self.found.setdefault(self.stack[-1], (heads, heads * tokens) if heads else ())
            elif name in ("softmax", "_softmax") and operand.ndim == 4:
                self.found.setdefault(self.stack[-1], tuple(operand.shape[1:3]))  # [batch, heads, tokens, keys] or heads third
        return func(*args, **kwargs)


class Recording:
    """First calls of all modules, and the modules that computed attention."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, Call] = {}
        self.attends: dict[nn.Module, tuple] = {}

    def run(self, module: nn.Module, inputs: dict) -> None:
        """Call `module`, keeping the first call of every module below it."""
        stack: list[nn.Module] = []
        entered: list[Call] = []
        calls: dict[nn.Module, Call] = {}
        attends: dict[nn.Module, tuple] = {}

        def before(m: nn.Module, args: tuple, kwargs: dict) -> None:
            stack.append(m)
            entered.append(Call(_keep(args), _keep(kwargs)))

        def after(m: nn.Module, *_) -> None:  # not called where the module raised
            calls.setdefault(m, entered[-1])

        def leave(*_) -> None:
            stack.pop()
            entered.pop()

        handles = []
        for m in module.modules():
            handles += [m.register_forward_pre_hook(before, with_kwargs=True), m.register_forward_hook(after),
                        m.register_forward_hook(leave, always_call=True)]
        try:
            with torch.no_grad(), _Attends(stack, attends):
                module(**inputs)
        finally:
            for handle in handles:
                handle.remove()
            self.attends = attends | self.attends
            self.calls = calls | self.calls


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of unit gain, so that a perturbation of any block shows; norms and vectors stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if not param.is_floating_point() or not param.numel():
                continue
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(noise / max(param[0].numel(), 1) ** 0.5)
            elif not param.any():
                param.copy_(0.1 * noise)
        for module in model.modules():
            if silenced := SILENCED.get(type(module).__name__):
                getattr(module, silenced).zero_()


@contextlib.contextmanager
def _without_norms(scope: nn.Module, enabled: bool) -> Iterator[None]:
    norms = [m for m in scope.modules() if "Norm" in type(m).__name__ and enabled and m is not scope]
    try:
        for norm in norms:
            norm.forward = lambda x, *_, **__: x
        yield
    finally:
        for norm in norms:
            del norm.forward


@contextlib.contextmanager
def _held(param: Tensor | None) -> Iterator[Tensor | None]:
    """The parameter, free to be overwritten: its values come back."""
    saved = None if param is None else param.detach().clone()
    try:
        yield param
    finally:
        if param is not None:
            param.copy_(saved)


class Watch:
    """Runs the smallest called module around some parameters again and reads what an output parameter reads."""

    def __init__(self, model: nn.Module, recording: Recording, names: list[str], output: str):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.params = dict(model.named_parameters(remove_duplicate=False))
        prefix = common_module(names)
        while prefix not in self.modules or self.modules[prefix] not in recording.calls:
            if not prefix:
                raise NotExercised("no module around it was called")
            prefix = prefix.rpartition(".")[0]
        self.scope = self.modules[prefix]
        for module in self.scope.modules():
            if why := UNRUNNABLE.get(type(module).__name__):
                raise NotExercised(why)
        self.call = recording.calls[self.scope]
        self.owner = self.modules[output.rpartition(".")[0]]
        self.weight = self.params[output]
        for self.norms, self.how in itertools.product((True, False), (self._by_hook, self._by_use, self._by_identity)):
            with contextlib.suppress(Exception):
                self.base = self.read()
                return
        self.norms = False
        self._run()
        raise NotExercised("nothing was seen to go through its output projection")

    def read(self) -> Tensor:
        """What the output parameter is multiplied with in its first use, [tokens, columns]."""
        seen = self.how()
        if isinstance(self.owner, (nn.Conv1d, nn.Conv2d)):
            seen = seen.movedim(1, -1)
        columns = max(self.weight.shape[0], self.weight[0].numel()) if seen.shape[-1] not in self._widths() else seen.shape[-1]
        return seen.detach().reshape(-1, columns).clone()

    def _widths(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel()

    def _run(self, *contexts):
        torch.manual_seed(0)
        with contextlib.ExitStack() as stack:
            for context in (torch.no_grad(), _without_norms(self.scope, self.norms), *contexts):
                stack.enter_context(context)
            return self.scope(*_keep(self.call.args), **_keep(self.call.kwargs))

    def _by_hook(self) -> Tensor:
        """The input of the module that owns the output parameter."""
        if self.owner is self.scope:
            raise NotExercised("the parameter belongs to the attention module itself")
        seen: list[Tensor] = []
        hook = self.owner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            self._run()
        finally:
            hook.remove()
        return seen[0]

    def _by_use(self) -> Tensor:
        """The other operand of the first operation that takes the output parameter."""
        seen: list[Tensor] = []

        class Uses(torch.overrides.TorchFunctionMode):
            def __torch_function__(_, func, types, args=(), kwargs=None):
                flat = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
                if any(a is self.weight for a in flat) and len(flat) < 4:
                    seen.extend(a for a in flat if a is not self.weight and a.ndim >= 2)
                return func(*args, **(kwargs or {}))

        self._run(Uses())
        return seen[0]

    def _by_identity(self) -> Tensor:
        """What the attention module returns while its (square) output parameter is the identity, without bias."""
        with torch.no_grad(), _held(self.weight), _held(getattr(self.owner, "bias", None)) as bias:
            if bias is not None:
                bias.zero_()
            self.weight.zero_()
            if self._returned().any():
                raise NotExercised("the module returns more than its output projection writes")
            self.weight.copy_(torch.eye(len(self.weight)))
            return self._returned()

    def _returned(self) -> Tensor:
        out = self._run()
        return out[0] if isinstance(out, tuple) else out

    def changed(self, perturb: Callable[[], None], restore: Callable[[], None]) -> tuple[Tensor, Tensor]:
        """(columns that moved, columns that moved at all) after a perturbation."""
        perturb()
        try:
            after = self.read()
        finally:
            restore()
        scale = self.base.abs().max().clamp_min(1e-20)
        moved = (after - self.base).abs().amax(0) / scale
        return moved > CHANGED, moved > SAME


class NotExercised(Exception):
    """A layer that no forward pass reached."""


def common_module(names: list[str]) -> str:
    """The longest dotted prefix that all names share."""
    parts = [name.split(".") for name in names]
    depth = 0
    while all(len(p) > depth for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    return ".".join(parts[0][:depth])
