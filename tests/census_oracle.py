"""An independent check of a head layout, by behaviour alone.

Every claimed block is perturbed and the input of the output projection is watched: it must move
in all the claimed columns and in no others. Nothing of how the layout was found is used: the
smallest called module around a layer's parameters is run again on the inputs it had in a real
forward pass, with normalisations taken out (a norm over a whole query mixes heads).
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
# Modules that compute attention without heads of their own, and why.
HEADLESS = {
    "Inkling2BlockAttentionResidual": "one learned query over earlier blocks, no projections",
    "Glm5NextTextHyperConnection": "weights of residual streams",
    "DeepseekV4HyperConnection": "weights of residual streams",
}
# Where a value row moves all columns of its head, and why.
ROWS_MIX = {"Florence2VisionChannelAttention": "attends between channels", "YosoSelfAttention": "normalises its output",
            "NeoMMEAttention": "takes out the part of its output along its own value"}
# What computes nothing on a CPU, and why.
UNRUNNABLE = {"MraSelfAttention": "its kernels need CUDA"}
# One head of these is several of the attention's heads, subtracted from one another.
COMPOSED = {"DiffLlamaAttention": 2}
# Parameters that let a value reach the other heads by design; zero while a layer is checked.
SILENCED = {"DogeAttention": "A"}  # the mask that doge derives from all values
ACROSS = ("q", "q_rope", "gate", "k", "v")


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


def check_layer(model: nn.Module, recording: Recording, layer, seed: int = 0) -> list[str]:
    """What is wrong with one layer's claims, as sentences; empty where all hold.

    Raises:
        NotExercised: no forward pass called it.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    outputs = [[p for p in head if p.role == "o" and not p.bias] for head in layer.heads]
    if not all(outputs) or len({p.param for head in outputs for p in head}) != 1:
        return [f"{layer.module}: the heads do not each own columns of one output projection"]
    names = [p.param for unit in (*layer.heads, *layer.groups) for p in unit] + [layer.module + ".x"]
    watch = Watch(model, recording, names, outputs[0][0].param)
    columns = [torch.tensor([i for p in head for i in range(p.start, p.stop)]) for head in outputs]
    wrong = []
    if sorted(torch.cat(columns).tolist()) != list(range(watch.base.shape[1])):
        wrong.append(f"{layer.module}: the claimed o columns are not each column of {outputs[0][0].param} once")
        return wrong
    generator = torch.Generator().manual_seed(seed)
    units = [(f"head {h}", pieces, [h]) for h, pieces in enumerate(layer.heads)]
    units += [(f"group {g}", pieces, [h for h, own in enumerate(layer.group_of) if own == g])
              for g, pieces in enumerate(layer.groups)]
    for title, pieces, heads in units:
        if not heads:
            wrong.append(f"{layer.module} {title}: no head reads it")
            continue
        expected = torch.zeros(watch.base.shape[1], dtype=torch.bool)
        for head in heads:
            expected[columns[head]] = True
        for role in dict.fromkeys((p.role, p.bias) for p in pieces if p.role in ACROSS):
            blocks = [p for p in pieces if (p.role, p.bias) == role]
            message = _check_block(watch, params, blocks, expected, generator)
            if message:
                wrong.append(f"{layer.module} {title} {role[0]}{' bias' if role[1] else ''} "
                             f"{blocks[0].param}[{blocks[0].start}:{blocks[0].stop}]: {message}")
        if type(watch.modules[layer.module]).__name__ not in ROWS_MIX:
            wrong += _check_rows(watch, params, layer.module, title, pieces, [columns[h] for h in heads], generator)
    return wrong


def _block(params: dict, piece) -> Tensor:
    """The piece as a view of the live parameter, counted as the layout's vocabulary says."""
    tensor = params[piece.param].detach()
    matrix = tensor.view(tensor.shape[0], -1)
    return matrix[piece.start:piece.stop] if piece.dim == 0 else matrix[:, piece.start:piece.stop]


def _check_block(watch: Watch, params: dict, blocks: list, expected: Tensor, generator) -> str:
    """"" where perturbing the blocks moves the expected columns and no others."""
    views = [_block(params, p) for p in blocks]
    saved = [v.clone() for v in views]
    noise = [torch.randn(v.shape, generator=generator) * v.std(unbiased=False).clamp_min(0.1 if v.shape[1] > 1 else 1.0) for v in views]
    moved, touched = watch.changed(lambda: [v.add_(n) for v, n in zip(views, noise)],
                                   lambda: [v.copy_(s) for v, s in zip(views, saved)])
    # softmax does not see a constant added to every score: a key bias may move nothing.
    silent = blocks[0].bias and blocks[0].role == "k"
    if (touched & ~expected).any():
        return f"also moves columns {_runs(touched & ~expected)}, not only {_runs(expected)}"
    if (expected & ~moved).any() and not silent:
        return f"does not move columns {_runs(expected & ~moved)} of {_runs(expected)}"
    return ""


def _check_rows(watch: Watch, params: dict, module: str, title: str, pieces, columns: list[Tensor], generator) -> list[str]:
    """Row i of a group's values must feed column i of each of its heads (first and last are tried)."""
    values = [(p, i) for p in pieces if p.role == "v" and not p.bias for i in range(p.size)]
    if any(dataclasses.replace(p, role="k") in pieces for p, _ in values):
        return []  # keys and values are one projection: a row moves the attention, and with it all columns
    if not values or any(len(c) != len(values) for c in columns):
        return []
    wrong = []
    for row in (0, len(values) - 1):
        piece, i = values[row]
        block = _block(params, piece)
        view = block[i] if piece.dim == 0 else block[:, i]
        saved = view.clone()
        noise = torch.randn(view.shape, generator=generator)
        _, touched = watch.changed(lambda: view.add_(noise), lambda: view.copy_(saved))
        expected = torch.zeros_like(touched)
        expected[torch.stack([c[row] for c in columns])] = True
        if not torch.equal(expected, touched):
            wrong.append(f"{module} {title} v row {row} moves columns {_runs(touched)}, not {_runs(expected)}")
    return wrong


def _runs(mask: Tensor) -> str:
    """Column indices of a mask as runs: "0:16 32:48"."""
    runs, start = [], None
    for i, on in enumerate([*mask.tolist(), False]):
        if on and start is None:
            start = i
        elif not on and start is not None:
            runs.append(f"{start}:{i}")
            start = None
    return " ".join(runs[:6]) + (" ..." if len(runs) > 6 else "") or "none"


def check_coverage(model: nn.Module, layout) -> list[str]:
    """Rows of a claimed projection that no head owns, or that two own, and forgotten biases."""
    params = dict(model.named_parameters(remove_duplicate=False))
    wrong, owned = [], {}
    for layer in layout.layers:
        for unit, mates in [(h, ()) for h in layer.heads] + [
                (g, {*g, *(p for h, of in zip(layer.heads, layer.group_of) if of == i for p in h)}) for i, g in enumerate(layer.groups)]:
            for p in unit:
                if p.param not in params or tuple(layout.shapes[p.param]) != tuple(params[p.param].shape):
                    wrong.append(f"{p.param}: no such parameter, or another shape than the layout states")
                    continue
                tensor = params[p.param]
                if p.role in ("k", "v") and any(dataclasses.replace(p, role=role) in mates for role in ("q", "k") if role != p.role):
                    continue  # one projection is both query and key, or both key and value
                extent = tensor.shape[0] if p.dim == 0 else tensor[0].numel()
                count = owned.setdefault((p.param, p.dim, p.role == "o"), torch.zeros(extent, dtype=torch.int))
                count[p.start:p.stop] += 1
    for (name, dim, _), count in owned.items():
        if (count == 0).any():
            wrong.append(f"{name} dim {dim}: {_runs(count == 0)} of {len(count)} belong to no head")
        if (count > 1).any():
            wrong.append(f"{name} dim {dim}: {_runs(count > 1)} of {len(count)} belong to several heads")
    for name in {key[0] for key in owned if not key[2]}:
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("weight") and bias in params and (bias, 0, False) not in owned:
            wrong.append(f"{bias}: rows of {name} are claimed, their biases are not")
    return wrong


def missed(model: nn.Module, recording: Recording, layout) -> list[str]:
    """Modules that computed attention although the layout has no layer there, or with other head counts."""
    names = {m: n for n, m in model.named_modules()}
    scopes = {layer.module: layer for layer in layout.layers}
    wrong = []
    params = dict(model.named_parameters(remove_duplicate=False))
    claimed = {id(params[p.param]) for layer in layout.layers for unit in (*layer.heads, *layer.groups) for p in unit}
    for module, heads in recording.attends.items():
        name = names.get(module)
        if name is None or type(module).__name__ in HEADLESS:
            continue
        heads = [n // COMPOSED.get(type(module).__name__, 1) for n in heads]
        if any(id(p) in claimed for p in module.parameters()) and not any(name.startswith(s) for s in scopes):
            continue  # tied to a layer that is in the layout
        layers = [layer for scope, layer in scopes.items() if name == scope or name.startswith(scope + ".")
                  or scope.startswith(name + ".")]
        if not layers:
            wrong.append(f"{name} ({type(module).__name__}) computes attention and is not in the layout")
        elif heads and len(layers) == 1 and layers[0].n_heads not in heads:
            wrong.append(f"{name} attends with {heads[0]} heads, the layout has {layers[0].n_heads}")
    return wrong
