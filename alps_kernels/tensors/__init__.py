"""What any room may use: ranges, DTensor helpers, slices kept in sync, files, ranks. Imports: nothing."""

from .checks import check_choice, check_type, first_of, refuse_constant
from .dtensor import bounds, is_sharded, like, local, share_of, sum_bytes_, sum_of_squares, viewed
from .files import MAX_JSON_BYTES, new_folder, read_json, replacing, save_tensors, write_atomic, write_json
from .ranges import Range, Ranges, as_matrix, blocks, complement, intersect, matrix_shape, merge
from .ranks import group_of, ranks_of_torchrun, shared
from .synced_slices import SUFFIX, SyncedSlice, leaf_of, sync_weights, synced_slice_of, synced_slices_in

__all__ = [
    "MAX_JSON_BYTES", "Range", "Ranges", "SUFFIX", "SyncedSlice", "as_matrix", "blocks", "bounds", "check_choice",
    "check_type", "complement", "first_of", "group_of", "intersect", "is_sharded", "leaf_of", "like", "local",
    "matrix_shape", "merge", "new_folder", "ranks_of_torchrun", "read_json", "refuse_constant", "replacing",
    "save_tensors", "share_of", "shared", "sum_bytes_", "sum_of_squares", "sync_weights", "synced_slice_of",
    "synced_slices_in", "viewed", "write_atomic", "write_json",
]
