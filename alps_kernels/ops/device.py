"""Load device code, make a device current, name dtypes as Triton does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch

ABI = 3  # of csrc_triton, as this package calls it


def device_code(module: str) -> ModuleType:
    """`csrc_triton.<module>`, once its calling convention is known to be ours.

    Raises:
        ImportError: triton is missing, or csrc_triton is of another version of this package.
    """
    import csrc_triton

    if csrc_triton.ABI != ABI:
        raise ImportError(f"csrc_triton at {csrc_triton.__path__[0]} has ABI {csrc_triton.ABI}, alps_kernels calls"
                          f" ABI {ABI}: the two are of different versions; install alps-kernels again")
    return import_module(f"csrc_triton.{module}")


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_type(dtype: torch.dtype):
    """Triton's name of a dtype that kernels take; int8 stands for 8-bit moments."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
            torch.int8: tl.int8}[dtype]
