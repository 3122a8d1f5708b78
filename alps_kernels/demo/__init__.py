"""The whole method on one small model, in one run. Imports: tensors, selection, weights, scoring, optim."""

from typing import Any

from .assets import AssetUnavailable

__all__ = ["AssetUnavailable", "run_demo"]


def run_demo(*args: Any, **options: Any) -> dict[str, Any]:
    """See `run.run_demo`, which is imported when it is called: it needs torch."""
    from .run import run_demo as run

    return run(*args, **options)
