"""Head patches: make, apply, revert, export. Imports: tensors, layout, selection, weights."""

from .apply import applied_patches, apply_patch, revert_patch, save_patch
from .checkpoint import CheckpointSource, apply_to_checkpoint, patch_from_checkpoints, revert_checkpoint
from .diff import diff_patches
from .export import export_lora, export_merged, export_sparse
from .make import check_fits
from .patch import HeadPatch

__all__ = [
    "CheckpointSource", "HeadPatch", "applied_patches", "apply_patch", "apply_to_checkpoint", "check_fits",
    "diff_patches", "export_lora", "export_merged", "export_sparse", "patch_from_checkpoints", "revert_checkpoint",
    "revert_patch", "save_patch",
]
