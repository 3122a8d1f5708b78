"""Check a layout against what the model computes.

Every claimed block of a value projection is perturbed, and exactly the claimed columns of the
output projection's input must move; the same for keys, queries and gates. Each attention module
is run alone, on inputs caught from one run of the model, so the check costs about two forward
passes of attention per head. A norm over all heads would carry a perturbation of one head to the
others: norms inside the attention module pass their input on unchanged while the check runs.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import merge
from .probes import HeadProbe, InputProbe, catch, norms_pass
from .slices import AttentionLayer, HeadSlice, LayoutError

_LEAK = 1e-4  # a column moves if it moves more than this share of the largest movement
_OF_HEAD = {"q": ("q", "q_rope"), "gate": ("gate",)}  # what is perturbed at once, by its name in messages
_OF_GROUP = {"value": ("v",), "key": ("k",)}
_TOKENS = 12  # positions of the default input: enough for every head to attend to several


def verify_layers(layers: Sequence[AttentionLayer], weights: Collection[str], model: nn.Module,
                  inputs: Mapping[str, Any] | None, seed: int) -> None:
    """Perturb every claimed block of `layers`; see `HeadLayout.verify`.

    Args:
        weights: every parameter that the layout names.
    """
    params = dict(model.named_parameters())
    meta = [name for name in weights if name not in params or params[name].is_meta]
    if meta:
        raise LayoutError(f"{meta[0]}: there is no such weight to perturb in this model"
                          + (" (it is on the meta device)" if meta[0] in params else ""))
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for module in [module for module in model.modules() if module.training]:
            stack.callback(setattr, module, "training", True)
        model.eval()
        torch.manual_seed(seed)
        around = {layer.index: _around(layer, modules) for layer in layers}
        wanted = {name: modules[name] for names in around.values() for name in names}
        calls = catch(partial(model, **(_default_inputs(model) if inputs is None else inputs)), wanted)
        for layer in layers:
            stage = next((name for name in around[layer.index] if name in calls), None)
            if stage is None:
                raise _not_reached(layer)
            _check_layer(layer, params, modules, stage, calls[stage], seed)


def _check_layer(layer: AttentionLayer, params: dict[str, nn.Parameter], modules: dict[str, nn.Module], stage: str,
                 call: tuple, seed: int) -> None:
    """Every head and group of one attention module, seen by calling the module `stage` again."""
    if not all(any(part.role == "o" for part in unit) for unit in layer.heads):
        raise LayoutError(f"{layer.module}: no output projection was located, so there is nothing to see its heads by")

    def call_stage() -> Any:
        torch.manual_seed(seed)
        args, kwargs = copy.deepcopy(call)
        return modules[stage](*args, **kwargs)

    with norms_pass(modules[stage]):
        probe = InputProbe(layer, modules, call_stage)
        if not probe.sees():
            if stage != _around(layer, modules)[0]:  # the block ran without its attention
                raise _not_reached(layer)
            probe = HeadProbe(layer, params, call_stage)
        base = probe.run()
        if not torch.equal(base, probe.run()):
            raise LayoutError(f"{layer.module}: two runs on the same input differ; it cannot be checked by "
                              "perturbation")
        for what, blocks, heads in _claims(layer):
            want = sorted(c for head in heads for c in probe.columns(head))
            if (moved := _moved(params, blocks, base, probe.run, seed)) != want:
                found = (f"columns {_ranges(moved)} of the output projection's input, not the claimed {_ranges(want)}"
                         if moved else "nothing with these inputs")
                raise LayoutError(f"{layer.module}: layer {layer.index}, {what} moves {found}")


def _not_reached(layer: AttentionLayer) -> LayoutError:
    return LayoutError(
        f"{layer.module}: the inputs do not reach this attention module; pass `inputs` that do, or the "
        "`layers` to check"
    )


def _claims(layer: AttentionLayer) -> Iterator[tuple[str, list[HeadSlice], list[int]]]:
    """What to perturb: a name, the blocks, and the heads that must move."""
    units = [(f"head {head}", unit, [head], _OF_HEAD) for head, unit in enumerate(layer.heads)]
    for group, unit in enumerate(layer.groups):
        heads = [head for head, own in enumerate(layer.group_of) if own == group]
        units.append((f"group {group}", unit, heads, _OF_GROUP))
    for name, unit, heads, sorts in units:
        for word, roles in sorts.items():
            if blocks := [part for part in unit if part.role in roles]:
                yield f"{name}: its {word} block", blocks, heads


def _moved(params: dict[str, nn.Parameter], blocks: Sequence[HeadSlice], base: Tensor, run, seed: int) -> list[int]:
    """Columns of the output projection's input that move with noise on `blocks`, whose bytes come back afterwards."""
    with ExitStack() as stack:
        for part in blocks:
            block = part.of(params[part.param].data)
            kept = block.clone()
            stack.callback(block.copy_, kept)
            draw = torch.Generator().manual_seed(seed)
            noise = torch.randn(block.shape, generator=draw, dtype=torch.float32, device="cpu")
            scale = 2 * max(float(kept.float().std(correction=0)), block.shape[-1] ** -0.5)
            block.add_((noise * scale).to(block))
        moved = (run() - base).abs().amax(0)
    top = moved.max()
    if not torch.isfinite(top):
        raise LayoutError(f"perturbing {blocks[0].param} gives values that are not finite; it cannot be checked")
    return torch.nonzero(moved > _LEAK * top).flatten().tolist() if top > 0 else []


def _around(layer: AttentionLayer, modules: Mapping[str, nn.Module]) -> list[str]:
    """What can be run to see the heads: the smallest module around attention and output, and its block.

    The block serves where the smallest one is run through its `forward`, past all hooks.
    """
    shared = commonprefix([layer.module.split("."), (layer.output or layer.module).split(".")])
    names = [".".join(shared[:depth]) for depth in range(len(shared), -1, -1)]
    return [name for name in names if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict))][:3]


def _default_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Random token ids for a model that takes `input_ids`; LayoutError where it takes something else."""
    inner = next((m for m in model.modules() if hasattr(m, "main_input_name")), model)
    wanted = getattr(inner, "main_input_name", "input_ids")
    table = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    size = getattr(table, "num_embeddings", None)
    if wanted != "input_ids" or size is None:
        raise LayoutError(f"{type(inner).__name__} takes {wanted}, not input_ids alone: pass `inputs`")
    ids = torch.randint(size // 2, (1, _TOKENS), device=next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)
    return inputs


def _ranges(columns: Sequence[int]) -> str:
    """Column numbers as half-open ranges."""
    return ", ".join(f"[{start}, {stop})" for start, stop in merge((c, c + 1) for c in columns))
