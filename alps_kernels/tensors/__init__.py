"""What any room may use: ranges, DTensor helpers, slices kept in sync, files, ranks. Imports: nothing."""

from .checks import check_choice, check_type, first_of, refuse_constant
from .dtensor import is_sharded, local_bounds, local_part, placed_like, share_of, sum_bytes_, sum_of_squares, viewed
from .files import MAX_JSON_BYTES, new_folder, read_json, save_tensors, write_atomic, write_json
from .ranges import Range, Ranges, as_matrix, blocks, complement, intersect, matrix_shape, merge
from .ranks import on_all_ranks, process_group, ranks_of_torchrun
from .synced_slices import (
    LEAF_SUFFIX, STEP_HOOK, SyncedSlice, leaf_of, sync_after_step, sync_leaves, sync_weights, synced_slice_of,
    synced_slices_in, written_together,
)

__all__ = [
    "LEAF_SUFFIX", "MAX_JSON_BYTES", "Range", "Ranges", "STEP_HOOK", "SyncedSlice", "as_matrix", "blocks",
    "check_choice", "check_type", "complement", "first_of", "intersect", "is_sharded", "leaf_of", "local_bounds",
    "local_part", "matrix_shape", "merge", "new_folder", "on_all_ranks", "placed_like", "process_group",
    "ranks_of_torchrun", "read_json", "refuse_constant", "save_tensors", "share_of", "sum_bytes_", "sum_of_squares",
    "sync_after_step", "sync_leaves", "sync_weights", "synced_slice_of", "synced_slices_in", "viewed",
    "write_atomic", "write_json", "written_together",
]
