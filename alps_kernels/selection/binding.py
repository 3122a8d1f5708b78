"""A selection on a model: which ranges of which parameters train, and how many that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layout import PART_OF, AttentionLayer, HeadLayout, LayerSummary, LayoutError
from ..tensors import SUFFIX, Ranges, SyncedSlice, as_matrix, complement, intersect, merge, synced_slices_in

if TYPE_CHECKING:
    from .selection import HeadSelection

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
        rows = self.param.shape[0] if self.param.ndim else 1
        return rows if self.dim == 0 else self.param.numel() // max(rows, 1)

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
        return [as_matrix(tensor).narrow(self.dim, start, stop - start) for start, stop in self.ranges]

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

    selection: HeadSelection
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
    def of(cls, selection: HeadSelection, summary: Sequence[LayerSummary]) -> SelectionCount:
        trained, total = defaultdict(int), defaultdict(int)
        chosen = defaultdict(set)
        for layer, head in selection.heads:
            chosen[layer].add(head)
        for index, layer in enumerate(summary):
            heads, groups = chosen[index], trained_groups(chosen[index], layer.group_of, selection.kv)
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
    """The key/value groups that train when `heads` of a layer are selected (DESIGN: kv policy)."""
    heads = set(heads)
    if kv == "none":
        return frozenset()
    touched = frozenset(group_of[head] for head in heads)
    if kv == "any":
        return touched
    return touched - {group for head, group in enumerate(group_of) if head not in heads}


def bind(selection: HeadSelection, model: nn.Module, rest: str, layout: HeadLayout | None) -> BoundSelection:
    """See `HeadSelection.bind`; of a sliced model it gives the leaves."""
    bound = bind_full(selection, model, rest, layout)
    mirrors = dict(synced_slices_in(model))
    return _onto_leaves(bound, model, mirrors) if mirrors else bound


def bind_full(selection: HeadSelection, model: nn.Module, rest: str, layout: HeadLayout | None) -> BoundSelection:
    """As `bind`, of the full parameters even where leaves hold their trained slices."""
    if layout is None:
        from ..layout import find_heads

        layout = find_heads(model)
    owned, chosen, cuts = _collected(selection, layout)
    named = dict(model.named_parameters())
    if missing := [name for name in owned if name not in named]:
        raise LayoutError(f"the layout names {missing[0]}, which this model does not have")
    leaves = {name + SUFFIX for name, _ in synced_slices_in(model)}
    params = []
    for name, param in named.items():
        if name in leaves:
            continue
        part = BoundParam(name, param, cuts.get(name, 0), merge(chosen[name]))
        if rest == "trainable" and param.is_floating_point():
            others = complement(part.ranges, part.extent) if name in owned else ()
            frozen = intersect(merge(owned[name]), others)
            part = BoundParam(name, param, part.dim, complement(frozen, part.extent))
        if part.ranges and param.numel():
            if not param.is_floating_point():
                raise ValueError(f"{name} holds selected heads but has dtype {param.dtype}; expected floating point")
            params.append(part)
    return BoundSelection(selection, tuple(params), rest, selection.count(layout))


def selected_ranges(selection: HeadSelection, layout: HeadLayout) -> dict[str, tuple[int, Ranges]]:
    """What `selection` trains of a model with this layout: by parameter the axis and the ranges along it.

    Raises:
        ValueError: the model has other heads than the selection was made for.
    """
    _, chosen, cuts = _collected(selection, layout)
    return {name: (cuts[name], merge(ranges)) for name, ranges in chosen.items()}


def _collected(selection: HeadSelection, layout: HeadLayout) -> tuple[dict, dict, dict]:
    """By parameter: the ranges that heads own, the selected ones of them, and the axis they cut."""
    if layout.heads_per_layer != selection.heads_per_layer:
        raise ValueError(f"the selection is for {_shape(selection.heads_per_layer)}, "
                         f"this model has {_shape(layout.heads_per_layer)}")
    owned, chosen, cuts = defaultdict(list), defaultdict(list), {}
    for layer in layout.layers:
        _collect(layer, selection, owned, chosen, cuts)
    return owned, chosen, cuts


def _onto_leaves(bound: BoundSelection, model: nn.Module, mirrors: dict[str, SyncedSlice]) -> BoundSelection:
    """The leaves in place of the full parameters they are slices of.

    Raises:
        ValueError: the model was sliced for something else than what is bound.
    """
    wanted = {part.name: part for part in bound.params}
    for name, mirror in mirrors.items():
        part = wanted.get(name)
        if part is None or (part.dim, part.ranges) != (mirror.dim, mirror.ranges):
            sort = ("rows", "columns")[mirror.dim]
            raise ValueError(f"{name} was sliced into {sort} {list(mirror.ranges)}, but of it this selection with rest"
                             f" {bound.rest!r} trains {'nothing' if part is None else list(part.ranges)}: slice the"
                             " model for this selection first (alps_kernels.slice_heads)")
    partial = [part.name for part in bound.params if not part.full and part.name not in mirrors]
    if partial:
        raise ValueError(f"{partial[0]} holds selected slices but was not sliced with the rest of this model: slice the"
                         " model for this selection first (alps_kernels.slice_heads)")
    params = []
    for name, param in model.named_parameters():
        if name in wanted and name not in mirrors:
            params.append(wanted[name])
        elif name.endswith(SUFFIX) and (mirror := mirrors.get(name.removesuffix(SUFFIX))) is not None:
            params.append(BoundParam(name, param, mirror.dim, ((0, mirror.size),), mirror.ranges))
    return replace(bound, params=tuple(params))


def _collect(layer: AttentionLayer, selection: HeadSelection, owned: dict, chosen: dict, cuts: dict) -> None:
    """Sort one layer's slices of the trained parts into all (owned) and selected (chosen) ranges."""
    heads = {head for owner, head in selection.heads if owner == layer.index}
    groups = trained_groups(heads, layer.group_of, selection.kv) if layer.groups else frozenset()
    for units, alive in ((layer.heads, heads), (layer.groups, groups)):
        for index, unit in enumerate(units):
            for part in unit:
                if PART_OF[part.role] not in selection.parts:
                    continue
                if cuts.setdefault(part.param, part.dim) != part.dim:
                    raise LayoutError(f"{part.param} is cut into rows by one head and columns by another")
                owned[part.param].append((part.start, part.stop))
                if index in alive:
                    chosen[part.param].append((part.start, part.stop))


def _shape(heads_per_layer: Sequence[int]) -> str:
    widths = sorted(set(heads_per_layer))
    return f"{sum(heads_per_layer)} heads in {len(heads_per_layer)} layers (of {', '.join(map(str, widths))})"
