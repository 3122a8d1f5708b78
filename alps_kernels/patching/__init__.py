"""Head patches: make, apply, revert, export. Imports: tensors, selection, weights."""

from .applied import applied_patches
from .apply import apply_patch, revert_patch
from .checkpoint import apply_to_checkpoint, patch_from_checkpoints, revert_checkpoint
from .diff import diff_patches
from .export import export_lora, export_merged, export_sparse
from .fit import check_fits, whole_weights
from .make import save_patch
from .patch import HeadPatch

__all__ = [
    "HeadPatch", "applied_patches", "apply_patch", "apply_to_checkpoint", "check_fits", "diff_patches",
    "export_lora", "export_merged", "export_sparse", "patch_from_checkpoints", "revert_checkpoint", "revert_patch",
    "save_patch", "whole_weights",
]
