"""ALPS: score attention heads by how far a task moved them, train the top ones only.

Names are loaded on first use: importing this package imports neither triton nor transformers.
"""

from importlib import import_module
from typing import Any

from .version import __version__

_HOMES = {
    "AttentionLayer": "layout",
    "HeadLayout": "layout",
    "HeadSlice": "layout",
    "LayoutError": "layout",
    "find_heads": "layout",
    "BoundSelection": "selection",
    "HeadSelection": "selection",
    "HeadScores": "scoring",
    "score_heads": "scoring",
    "HeadAdamW": "optim",
    "HeadPatch": "patching",
    "save_patch": "patching",
    "apply_patch": "patching",
    "revert_patch": "patching",
    "applied_patches": "patching",
    "export_lora": "patching",
    "export_merged": "patching",
    "export_sparse": "patching",
    "GuardError": "selection",
    "guard": "selection",
    "slice_heads": "slicing",
    "unslice_heads": "slicing",
    "AlpsCallback": "integrations",
    "use_heads": "integrations",
    "alps_finetune": "integrations",
    "paper_arguments": "integrations",
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
