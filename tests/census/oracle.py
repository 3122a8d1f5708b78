"""An independent check of a head layout, by behaviour alone.

Every claimed block is perturbed and the input of the output projection is watched: it must move
in all the claimed columns and in no others. Nothing of how the layout was found is used.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from .watch import NotExercised, Recording, Watch, randomize

__all__ = ["NotExercised", "Recording", "check_coverage", "check_layer", "missed", "randomize"]

# Modules that compute attention without heads of their own, and why.
HEADLESS = {
    "Inkling2BlockAttentionResidual": "one learned query over earlier blocks, no projections",
    "Glm5NextTextHyperConnection": "weights of residual streams",
    "DeepseekV4HyperConnection": "weights of residual streams",
}
# Where a value row moves all columns of its head, and why.
ROWS_MIX = {"Florence2VisionChannelAttention": "attends between channels", "YosoSelfAttention": "normalises its output",
            "NeoMMEAttention": "takes out the part of its output along its own value"}
# One head of these is several of the attention's heads, subtracted from one another.
COMPOSED = {"DiffLlamaAttention": 2}
ACROSS = ("q", "q_rope", "gate", "k", "v")


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
