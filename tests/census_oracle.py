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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

CHANGED, SAME = 1e-4, 1e-5  # of the largest value that the output projection reads
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

    def __init__(self, stack: list[nn.Module], found: dict[nn.Module, int]):
        super().__init__()
        self.stack, self.found = stack, found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.stack and name == "scaled_dot_product_attention":
            query = args[0] if args else kwargs["query"]
            self.found.setdefault(self.stack[-1], query.shape[-3] if query.ndim >= 4 else 0)
        elif self.stack and name in ("softmax", "_softmax"):
            scores = args[0] if args else kwargs.get("input")
            if isinstance(scores, Tensor) and scores.ndim == 4:
                self.found.setdefault(self.stack[-1], scores.shape[1])
        return func(*args, **kwargs)


class Recording:
    """First calls of all modules, and the modules that computed attention."""

    def __init__(self) -> None:
        self.calls: dict[nn.Module, Call] = {}
        self.attends: dict[nn.Module, int] = {}

    def run(self, module: nn.Module, inputs: dict) -> None:
        """Call `module`, keeping the first call of every module below it."""
        stack: list[nn.Module] = []
        calls: dict[nn.Module, Call] = {}
        attends: dict[nn.Module, int] = {}

        def before(m: nn.Module, args: tuple, kwargs: dict) -> None:
            stack.append(m)
            if m not in calls:
                calls[m] = Call(_keep(args), _keep(kwargs))

        handles = []
        for m in module.modules():
            handles += [m.register_forward_pre_hook(before, with_kwargs=True),
                        m.register_forward_hook(lambda *_: stack.pop() and None, always_call=True)]
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
            if not param.is_floating_point():
                continue
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim >= 2:
                param.copy_(noise / max(param[0].numel(), 1) ** 0.5)
            elif not param.any():
                param.copy_(0.1 * noise)


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
        self.call = recording.calls[self.scope]
        self.owner = self.modules[output.rpartition(".")[0]]
        self.weight = self.params[output]
        self.norms = True
        for self.norms in (True, False):
            with contextlib.suppress(Exception):
                self.base = self.read()
                break
        else:
            self.base = self.read()

    def read(self) -> Tensor:
        """What the output parameter is multiplied with in its first use, [tokens, columns]."""
        seen: list[Tensor] = []

        class Uses(torch.overrides.TorchFunctionMode):
            def __torch_function__(_, func, types, args=(), kwargs=None):
                flat = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
                if any(a is self.weight for a in flat):
                    seen.extend(a for a in flat if a is not self.weight and a.ndim >= 2)
                return func(*args, **(kwargs or {}))

        hook = self.owner.register_forward_pre_hook(lambda _, args: seen.append(args[0]) if args else None)
        direct = self.owner is self.scope or not any(p is self.weight for p in self.owner.parameters(recurse=False))
        try:
            torch.manual_seed(0)
            with torch.no_grad(), _without_norms(self.scope, self.norms), Uses() if direct else contextlib.nullcontext():
                self.scope(*_keep(self.call.args), **_keep(self.call.kwargs))
        finally:
            hook.remove()
        if not seen:
            raise NotExercised("its output projection was not used")
        return seen[0].detach().reshape(-1, seen[0].shape[-1]).clone()

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
        expected = torch.zeros(watch.base.shape[1], dtype=torch.bool)
        for head in heads:
            expected[columns[head]] = True
        for role in dict.fromkeys((p.role, p.bias) for p in pieces if p.role in ACROSS):
            blocks = [p for p in pieces if (p.role, p.bias) == role]
            message = _check_block(watch, params, blocks, expected, generator)
            if message:
                wrong.append(f"{layer.module} {title} {role[0]}{' bias' if role[1] else ''} "
                             f"{blocks[0].param}[{blocks[0].start}:{blocks[0].stop}]: {message}")
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
    noise = [torch.randn(v.shape, generator=generator) * v.std(unbiased=False).clamp_min(0.1) for v in views]
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
        for unit in (*layer.heads, *layer.groups):
            for p in unit:
                if p.param not in params or tuple(layout.shapes[p.param]) != tuple(params[p.param].shape):
                    wrong.append(f"{p.param}: no such parameter, or another shape than the layout states")
                    continue
                tensor = params[p.param]
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
    for module, heads in recording.attends.items():
        name = names.get(module)
        if name is None:
            continue
        layers = [layer for scope, layer in scopes.items() if name == scope or name.startswith(scope + ".")
                  or scope.startswith(name + ".")]
        if not layers:
            wrong.append(f"{name} ({type(module).__name__}) computes attention and is not in the layout")
        elif heads and len(layers) == 1 and layers[0].n_heads != heads:
            wrong.append(f"{name} attends with {heads} heads, the layout has {layers[0].n_heads}")
    return wrong
