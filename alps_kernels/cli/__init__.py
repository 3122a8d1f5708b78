"""The command `alps`: it parses, calls and prints. Imports: tensors, selection, scoring, patching, demo."""

from .commands import main

__all__ = ["main"]
