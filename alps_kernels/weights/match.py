"""Matching the attention layers of two models by name."""

from __future__ import annotations

from collections.abc import Callable
from os.path import commonprefix

from ..layout import AttentionLayer, LayoutError
from .weights import Weights, with_params


def match_layers(base: Weights, task: Weights) -> Callable[[str], str]:
    """Match the attention layers of two models by name.

    The modules' names must be equal, or equal after one prefix of each model is cut off (models
    with different head modules: `encoder.layer.0...` against `bert.encoder.layer.0...`).

    Returns:
        a function from a parameter name of `base` to the one of `task`.

    Raises:
        LayoutError: they are not of one architecture; it names the first difference.
    """
    if None not in (base.model_type, task.model_type) and base.model_type != task.model_type:
        raise LayoutError(f"{base.name} is a {base.model_type} and {task.name} a {task.model_type}: "
                          "scores compare two models of one architecture")
    ours, theirs = base.layout.layers, task.layout.layers
    if len(ours) != len(theirs):
        raise LayoutError(f"{base.name} has {len(ours)} attention layers and {task.name} {len(theirs)}: "
                          "scores compare two models of one architecture")
    pair = prefixes(ours[0].module, theirs[0].module)

    def rename(name: str) -> str:
        if (found := moved(name, pair)) is None:
            raise LayoutError(f"{name} of {base.name} does not begin with {pair[0]!r}, as the other attention weights "
                              f"do; cannot tell which weight of {task.name} it is")
        return found

    for mine, other in zip(ours, theirs, strict=True):
        if moved(mine.module, pair) != other.module:
            raise LayoutError(f"cannot tell which attention layer of {task.name} is {mine.module} of {base.name}: "
                              f"{ours[0].module} goes with {theirs[0].module}, but next is {other.module}")
        _check_pair(base, mine, task, other, rename)
    return rename


def prefixes(ours: str, theirs: str) -> tuple[str, str]:
    """What is left of two dotted names before their longest common tail; "" or ends in a dot."""
    a, b = ours.split("."), theirs.split(".")
    common = len(commonprefix([a[::-1], b[::-1]]))
    cut, put = ("".join(word + "." for word in words[:len(words) - common]) for words in (a, b))
    return cut, put


def moved(name: str, pair: tuple[str, str]) -> str | None:
    """`name` with the first prefix of `pair` replaced by the second; None where it has another."""
    cut, put = pair
    return put + name[len(cut):] if name.startswith(cut) else None


def _check_pair(base: Weights, mine: AttentionLayer, task: Weights, other: AttentionLayer,
                rename: Callable[[str], str]) -> None:
    for what, ours, theirs in (("query heads", mine.n_heads, other.n_heads),
                               ("key/value groups", mine.n_groups, other.n_groups)):
        if ours != theirs:
            raise LayoutError(f"{mine.module}: {base.name} has {ours} {what}, {task.name} has {theirs}")
    for name in sorted({part.param for part in mine.parts}):
        ours, theirs = base.layout.shapes[name], task.layout.shapes.get(rename(name))
        if theirs is None:
            raise LayoutError(f"{task.name} has no {rename(name)}, which goes with {name} of {base.name}")
        if ours != theirs:
            raise LayoutError(f"{name} is {list(ours)} in {base.name} and {list(theirs)} in {task.name}")
    same = all(rename(part.param) == part.param for part in mine.parts)
    here, there = ((layer.group_of, layer.kv_layer, layer.heads, layer.groups)
                   for layer in (mine if same else with_params(mine, rename), other))
    if here != there:
        raise LayoutError(f"{mine.module}: the heads of {base.name} and {task.name} lie differently in its weights")
