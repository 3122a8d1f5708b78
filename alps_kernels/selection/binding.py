"""A selection on a model: which ranges of which parameters train, and how many that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..layout import PART_OF, AttentionLayer, HeadLayout, HeadSlice, LayerSummary, LayoutError, find_heads
from ..tensors import (
    LEAF_SUFFIX, Range, Ranges, SyncedSlice, blocks, complement, matrix_shape, merge, synced_slices_in,
)
from .head_set import HeadSet


@dataclass(frozen=True)
class BoundParam:
    """The part of one parameter that trains.

    Attributes:
        name: in `model.named_parameters()`.
        param: the parameter itself.
        dim: the axis that is cut, 0 rows or 1 columns of `as_matrix(param)`.
        ranges: half-open, along `dim`, sorted, disjoint, adjacent ones merged.
        within: of a leaf of a sliced model, which ranges of the full parameter it holds.
    """

    name: str
    param: nn.Parameter
    dim: int
    ranges: Ranges
    within: Ranges | None = None

    @property
    def extent(self) -> int:
        """The length of the axis that is cut."""
        return matrix_shape(self.param.shape)[self.dim]

    @property
    def full(self) -> bool:
        """The ranges cover the whole parameter."""
        return self.ranges == ((0, self.extent),)

    @property
    def numel(self) -> int:
        """Selected elements."""
        return sum(stop - start for start, stop in self.ranges) * (self.param.numel() // max(self.extent, 1))

    def blocks(self, tensor: Tensor) -> list[Tensor]:
        """The selected ranges as 2-D views of `tensor`, which has the parameter's shape."""
        return blocks(tensor, self.dim, self.ranges)

    @torch.no_grad()
    def cut(self, tensor: Tensor) -> Tensor:
        """The selected elements of `tensor`, compact: range after range, each row-major, [numel]."""
        parts = [block.reshape(-1) for block in self.blocks(tensor)]
        return torch.cat(parts) if parts else tensor.new_empty(0)

    @torch.no_grad()
    def spread(self, compact: Tensor, out: Tensor) -> None:
        """Write `compact` ([numel], in `cut` order) to its places in `out`; the rest is left alone."""
        if compact.numel() != self.numel:
            raise ValueError(f"{self.name}: {compact.numel()} compact elements for {self.numel} selected ones")
        at = 0
        for block in self.blocks(out):
            block.copy_(compact[at:at + block.numel()].view(block.shape))
            at += block.numel()


@dataclass(frozen=True)
class BoundSelection:
    """A `HeadSelection` on a model.

    Attributes:
        selection: where it is from.
        params: every parameter of which something trains, in `named_parameters()` order.
        rest: "frozen" or "trainable", see `HeadSelection.bind`.
        count: the honest number of head parameters that train.
    """

    selection: HeadSet
    params: tuple[BoundParam, ...]
    rest: str
    count: SelectionCount

    @property
    def numel(self) -> int:
        """Elements that train, those of `rest` included."""
        return sum(part.numel for part in self.params)

    def __str__(self) -> str:
        return f"{self.count}; {self.numel:,} elements of {len(self.params)} parameters train, rest {self.rest}"


@dataclass(frozen=True)
class SelectionCount:
    """How many elements of the heads' projections train, by part.

    Attributes:
        trained, total: elements by part ("q", "k", "v", "o"), biases included; a part that
            the selection does not train has 0 trained.
    """

    trained: dict[str, int]
    total: dict[str, int]

    @classmethod
    def of(cls, selection: HeadSet, summary: Sequence[LayerSummary]) -> SelectionCount:
        trained, total = defaultdict(int), defaultdict(int)
        for index, layer in enumerate(summary):
            heads = selection.in_layer(index)
            groups = trained_groups(heads, layer.group_of, selection.kv)
            for size, alive, n in ((layer.head_size, len(heads), len(layer.group_of)),
                                   (layer.group_size, len(groups), len(set(layer.group_of)))):
                for part, numel in size.items():
                    total[part] += n * numel
                    trained[part] += alive * numel if part in selection.parts else 0
        return cls(dict(trained), dict(total))

    def share(self, parts: Sequence[str] = ("q", "k", "v")) -> float:
        """Trained share of the given parts, 0 where the model has none of them."""
        return sum(self.trained.get(p, 0) for p in parts) / max(sum(self.total.get(p, 0) for p in parts), 1)

    def __str__(self) -> str:
        each = ", ".join(f"{part} {self.share(part):.1%}" for part in ("q", "k", "v", "o") if self.total.get(part))
        return f"{sum(self.trained.values()):,} head parameters train: {self.share():.1%} of q/k/v ({each})"


def trained_groups(heads: Iterable[int], group_of: Sequence[int], kv: str) -> frozenset[int]:
    """The key/value groups that train when `heads` of a layer are selected."""
    heads = set(heads)
    if kv == "none":
        return frozenset()
    touched = frozenset(group_of[head] for head in heads)
    if kv == "any":
        return touched
    return touched - {group for head, group in enumerate(group_of) if head not in heads}


def bind(selection: HeadSet, model: nn.Module, rest: str, layout: HeadLayout | None) -> BoundSelection:
    """See `HeadSelection.bind`; of a sliced model it gives the leaves."""
    bound = bind_full(selection, model, rest, layout)
    slices = dict(synced_slices_in(model))
    return _onto_leaves(bound, model, slices) if slices else bound


def bind_full(selection: HeadSet, model: nn.Module, rest: str, layout: HeadLayout | None) -> BoundSelection:
    """As `bind`, of the full parameters even where leaves hold their trained slices."""
    layout = find_heads(model) if layout is None else layout
    found, named = _head_ranges(selection, layout), dict(model.named_parameters())
    if missing := [name for name in found if name not in named]:
        raise LayoutError(f"the layout names {missing[0]}, which this model does not have")
    leaves = {name + LEAF_SUFFIX for name, _ in synced_slices_in(model)}
    params = []
    for name, param in named.items():
        if name in leaves:
            continue
        dim, owned, chosen = found.get(name, (0, (), ()))
        part = BoundParam(name, param, dim, merge(chosen))
        if rest == "trainable" and param.is_floating_point():
            others = complement(merge(owned), part.extent)
            part = replace(part, ranges=merge((*chosen, *others)))
        if part.ranges and param.numel():
            if not param.is_floating_point():
                raise ValueError(f"{name} holds selected heads but has dtype {param.dtype}; expected floating point")
            params.append(part)
    return BoundSelection(selection, tuple(params), rest, SelectionCount.of(selection, layout.summary()))


def selected_ranges(selection: HeadSet, layout: HeadLayout) -> dict[str, tuple[int, Ranges]]:
    """What `selection` trains of a model with this layout: by parameter the axis and the ranges along it.

    Raises:
        ValueError: the model has other heads than the selection was made for.
    """
    found = _head_ranges(selection, layout)
    return {name: (dim, merge(chosen)) for name, (dim, _, chosen) in found.items() if chosen}


def _head_ranges(selection: HeadSet, layout: HeadLayout) -> dict[str, tuple[int, list[Range], list[Range]]]:
    """By parameter the axis that the heads cut, the ranges of all heads and those of the selected ones."""
    if layout.heads_per_layer != selection.heads_per_layer:
        raise ValueError(f"the selection is for {_shape(selection.heads_per_layer)}, "
                         f"this model has {_shape(layout.heads_per_layer)}")
    found: dict[str, tuple[int, list[Range], list[Range]]] = {}
    for layer in layout.layers:
        for part, trains in _head_slices(layer, selection):
            dim, owned, chosen = found.setdefault(part.param, (part.dim, [], []))
            if dim != part.dim:
                raise LayoutError(f"{part.param} is cut into rows by one head and columns by another")
            owned.append((part.start, part.stop))
            if trains:
                chosen.append((part.start, part.stop))
    return found


def _head_slices(layer: AttentionLayer, selection: HeadSet) -> Iterator[tuple[HeadSlice, bool]]:
    """One layer's slices of the parts that the selection trains, and whether their head or group is selected."""
    heads = selection.in_layer(layer.index)
    groups = trained_groups(heads, layer.group_of, selection.kv) if layer.groups else frozenset()
    for units, chosen in ((layer.heads, heads), (layer.groups, groups)):
        for index, unit in enumerate(units):
            for part in unit:
                if PART_OF[part.role] in selection.parts:
                    yield part, index in chosen


def _onto_leaves(bound: BoundSelection, model: nn.Module, slices: dict[str, SyncedSlice]) -> BoundSelection:
    """The leaves in place of the full parameters; ValueError where the model was sliced for another selection."""
    wanted = {part.name: part for part in bound.params}
    for name, synced in slices.items():
        part = wanted.get(name)
        if part is None or (part.dim, part.ranges) != (synced.dim, synced.ranges):
            sort = ("rows", "columns")[synced.dim]
            raise ValueError(f"{name} was sliced into {sort} {list(synced.ranges)}, but of it this selection with rest"
                             f" {bound.rest!r} trains {'nothing' if part is None else list(part.ranges)}: slice the"
                             " model for this selection first (alps_kernels.slice_heads)")
    partial = [part.name for part in bound.params if not part.full and part.name not in slices]
    if partial:
        raise ValueError(f"{partial[0]} holds selected slices but was not sliced with the rest of this model: slice the"
                         " model for this selection first (alps_kernels.slice_heads)")
    params = []
    for name, param in model.named_parameters():
        if name in wanted and name not in slices:
            params.append(wanted[name])
        elif name.endswith(LEAF_SUFFIX) and (synced := slices.get(name.removesuffix(LEAF_SUFFIX))) is not None:
            params.append(BoundParam(name, param, synced.dim, ((0, synced.size),), synced.ranges))
    return replace(bound, params=tuple(params))


def _shape(heads_per_layer: Sequence[int]) -> str:
    widths = sorted(set(heads_per_layer))
    return f"{sum(heads_per_layer)} heads in {len(heads_per_layer)} layers (of {', '.join(map(str, widths))})"
