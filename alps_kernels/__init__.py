"""ALPS: score attention heads by how far a task moved them, train the top ones only.

Names are loaded on first use: importing this package imports neither triton nor transformers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AttentionLayer": "layout",
    "HeadLayout": "layout",
    "HeadSlice": "layout",
    "LayoutError": "layout",
    "find_heads": "locate",
    "BoundSelection": "selection",
    "HeadSelection": "selection",
    "HeadScores": "scores",
    "score_heads": "scoring",
    "HeadAdamW": "optimizer",
    "HeadPatch": "patch_file",
    "save_patch": "patch",
    "apply_patch": "patch",
    "revert_patch": "patch",
    "applied_patches": "patch",
    "export_lora": "export",
    "export_merged": "export",
    "export_sparse": "export",
    "GuardError": "guarding",
    "guard": "guarding",
    "slice_heads": "sliced",
    "unslice_heads": "sliced",
    "AlpsCallback": "integrations.callback",
    "use_heads": "integrations.trainer",
    "alps_finetune": "integrations.finetune",
    "paper_arguments": "integrations.finetune",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
