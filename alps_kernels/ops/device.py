"""Load device code, and all that the package asks of a device: streams, captures, pinned memory; Triton's names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

ABI = 6  # of csrc_triton, as this package calls it
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # as Triton does: faster than the public function


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


def runs_kernels(tensor: Tensor) -> bool:
    """Triton's kernels run where it is."""
    return tensor.is_cuda


def has_streams(device: torch.device) -> bool:
    """Work is queued on streams there, which the host does not wait for."""
    return device.type == "cuda"


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches go to the current device: make it the tensors'."""
    return torch.cuda.device(device) if has_streams(device) else nullcontext()


def capturing(device: torch.device) -> bool:
    """The current stream of the current device records a CUDA graph: nothing runs now."""
    return has_streams(device) and torch.cuda.is_current_stream_capturing()


def is_hopper(device: torch.device) -> bool:
    """Its tensor cores are those of compute capability 9.0, which four warps feed together."""
    return has_streams(device) and not torch.version.hip and torch.cuda.get_device_capability(device)[0] == 9


def current_stream(device: torch.device) -> int:
    """The handle of the current stream, 0 where there are none."""
    if not has_streams(device):
        return 0
    return _raw_stream(device.index) if _raw_stream is not None else torch.cuda.current_stream(device).cuda_stream


def pinned_bytes(size: int, device: torch.device) -> Tensor:
    """Memory of the host from which copies to `device` need not wait; uint8 [size]."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=has_streams(device))


def send(pinned: Tensor, there: Tensor) -> None:
    """Copy to the device in the order of the current stream; the host does not wait."""
    there.copy_(pinned, non_blocking=True)


def new_event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.Event() if has_streams(device) else None


def keep_for_current_stream(tensor: Tensor) -> None:
    """Its memory is not given away before what the current stream does now is done."""
    tensor.record_stream(torch.cuda.current_stream(tensor.device))


def triton_type(dtype: torch.dtype):
    """Triton's name of a dtype that kernels take; int8 stands for 8-bit moments."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
            torch.int8: tl.int8}[dtype]
