"""Which heads train: the selection, bound to a model; the guard of frozen bytes. Imports: tensors, layout."""

from .binding import BoundParam, BoundSelection, bind_full, selected_ranges
from .frozen_guard import GuardError, guard
from .selection import REST, HeadSelection, remember, remembered, resolve_count, selection_of, top_count
from .shards import check_shards, clip, cut_compact, gather_compact, part_here

__all__ = [
    "BoundParam", "BoundSelection", "GuardError", "HeadSelection", "REST", "bind_full", "check_shards", "clip",
    "cut_compact", "gather_compact", "guard", "part_here", "remember", "remembered", "resolve_count",
    "selected_ranges", "selection_of", "top_count",
]
