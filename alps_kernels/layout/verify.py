"""Check a layout against what the model computes.

Every claimed block of a value projection is perturbed, and exactly the claimed columns of the
output projection's input must move; the same for keys, queries and gates. Each attention module
is run alone, on inputs caught from one run of the model, so the check costs about two forward
passes of attention per head. A norm over all heads would carry a perturbation of one head to the
others: norms inside the attention module pass their input on unchanged while the check runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import AttentionLayer, HeadLayout, HeadSlice, LayoutError
from .probes import HeadProbe, InputProbe, norms_pass

_LEAK = 1e-4  # a column moves if it moves more than this share of the largest movement
_BLOCKS = (("v", "value"), ("k", "key"))
_TOKENS = 12  # positions of the default input: enough for every head to attend to several


def verify_layout(
    layout: HeadLayout,
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> None:
    """Perturb every claimed block and see that the claimed columns move, and no others.

    The model is run once in eval mode, then each attention module alone; weights, hooks, modes
    and the random state are what they were afterwards, also after an error.

    Args:
        layout: what `find_heads` said.
        model: the model it was said of.
        inputs: keyword arguments of the model. Default: random `input_ids` (and
            `decoder_input_ids`), which reach the text layers only.
        layers: indices of the layers to check. Default: all; those that the inputs do not reach
            are an error, never passed over.
        seed: of the default inputs and of the perturbations.

    Raises:
        LayoutError: a block moves other columns than claimed, or a layer cannot be checked
            (not reached, or its output projection's input cannot be seen); names layer and head.
    """
    chosen = layout.layers if layers is None else tuple(layout.layers[i] for i in layout.where(tuple(layers)))
    params = dict(model.named_parameters())
    meta = [name for name in layout.shapes if name not in params or params[name].is_meta]
    if meta:
        raise LayoutError(
            f"{meta[0]}: there is no such weight to perturb in this model"
            + (" (it is on the meta device)" if meta[0] in params else "")
        )
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_eval_mode(model))
        torch.manual_seed(seed)
        around = {layer.index: _around(layer, modules) for layer in chosen}
        wanted = {name: modules[name] for names in around.values() for name in names}
        calls = _catch(model, wanted, _default_inputs(model) if inputs is None else inputs)
        for layer in chosen:
            stage = next((name for name in around[layer.index] if name in calls), None)
            if stage is None:
                raise _not_reached(layer)
            _check_layer(layer, params, modules, stage, calls[stage], seed)


def _check_layer(
    layer: AttentionLayer,
    params: dict[str, nn.Parameter],
    modules: dict[str, nn.Module],
    stage: str,
    call: tuple,
    seed: int,
) -> None:
    """Every head and group of one attention module, seen by calling the module `stage` again.

    Raises:
        LayoutError: see `verify_layout`.
    """
    if not all(any(part.role == "o" for part in unit) for unit in layer.heads):
        raise LayoutError(
            f"{layer.module}: no output projection was located, so there is nothing to see its heads by"
        )

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
            raise LayoutError(
                f"{layer.module}: two runs on the same input differ; it cannot be checked by perturbation"
            )
        for what, blocks, heads in _claims(layer):
            want = sorted(c for head in heads for c in probe.columns(head))
            _compare(layer, what, _moved(params, blocks, base, probe.run, seed), want)


def _not_reached(layer: AttentionLayer) -> LayoutError:
    return LayoutError(
        f"{layer.module}: the inputs do not reach this attention module; pass `inputs` that do, or the "
        "`layers` to check"
    )


def _claims(layer: AttentionLayer) -> Iterator[tuple[str, list[HeadSlice], list[int]]]:
    """What to perturb: a name, the blocks, and the heads that must move."""
    for head, unit in enumerate(layer.heads):
        for role in ("q", "gate"):
            blocks = [part for part in unit if part.role == role or (role == "q" and part.role == "q_rope")]
            if blocks:
                yield f"head {head}: its {role} block", blocks, [head]
    for group, unit in enumerate(layer.groups):
        heads = [head for head, own in enumerate(layer.group_of) if own == group]
        for role, word in _BLOCKS:
            if blocks := [part for part in unit if part.role == role]:
                yield f"group {group}: its {word} block", blocks, heads


def _compare(layer: AttentionLayer, what: str, moved: list[int], want: list[int]) -> None:
    if moved == sorted(want):
        return
    if not moved:
        raise LayoutError(f"{layer.module}: layer {layer.index}, {what} moves nothing with these inputs")
    raise LayoutError(
        f"{layer.module}: layer {layer.index}, {what} moves columns {_ranges(moved)} of the output "
        f"projection's input, not the claimed {_ranges(sorted(want))}"
    )


def _moved(
    params: dict[str, nn.Parameter], blocks: Sequence[HeadSlice], base: Tensor, run, seed: int
) -> list[int]:
    """Columns of the output projection's input that move when `blocks` are replaced by noise."""
    with ExitStack() as stack:
        for part in blocks:
            stack.enter_context(_perturbed(part.of(params[part.param].data), seed))
        moved = (run() - base).abs().amax(0)
    top = moved.max()
    if not torch.isfinite(top):
        raise LayoutError(
            f"perturbing {blocks[0].param} gives values that are not finite; it cannot be checked"
        )
    return torch.nonzero(moved > _LEAK * top).flatten().tolist() if top > 0 else []


@contextmanager
def _perturbed(block: Tensor, seed: int) -> Iterator[None]:
    """Noise added to a block of a weight; its bytes come back afterwards."""
    kept = block.clone()
    noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    scale = 2 * max(float(kept.float().std(correction=0)), block.shape[-1] ** -0.5)
    try:
        block.add_((noise * scale).to(block))
        yield
    finally:
        block.copy_(kept)


def _around(layer: AttentionLayer, modules: Mapping[str, nn.Module]) -> list[str]:
    """What can be run to see the heads: the smallest module around attention and output, and its block.

    The block serves where the smallest one is run through its `forward`, past all hooks.
    """
    shared = []
    for a, b in zip(layer.module.split("."), (layer.output or layer.module).split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    names = [".".join(shared[:depth]) for depth in range(len(shared), -1, -1)]
    return [name for name in names if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict))][:3]


def _catch(model: nn.Module, stages: dict[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, tuple]:
    """Run the model once; the arguments of the first call of every stage."""
    calls: dict[str, tuple] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if name not in calls:
                calls[name] = copy.deepcopy((args, kwargs))

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in stages.items()
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _default_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Random token ids for a model that takes `input_ids`.

    Raises:
        LayoutError: the model takes something else; the user has to pass `inputs`.
    """
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


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _ranges(columns: Sequence[int]) -> str:
    """Column numbers as half-open ranges."""
    spans: list[list[int]] = []
    for column in columns:
        if spans and spans[-1][1] == column:
            spans[-1][1] = column + 1
        else:
            spans.append([column, column + 1])
    return ", ".join(f"[{start}, {stop})" for start, stop in spans)
