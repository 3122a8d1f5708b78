"""What torch puts around a step of an optimizer, left away where nobody sees it."""

from __future__ import annotations

import torch
from torch.autograd import _profiler_enabled
from torch.optim import optimizer as torchs

from ..tensors import STEP_HOOK

# Private to torch: where they are not found, every step takes torch's way.
_BEFORE = getattr(torchs, "_global_optimizer_pre_hooks", {"unknown": None})
_AFTER = getattr(torchs, "_global_optimizer_post_hooks", {})
# torch's check of capturable groups in a capture, renamed since 2.9
check_capture = getattr(torchs.Optimizer, "_accelerator_graph_capture_health_check", None) \
    or torchs.Optimizer._cuda_graph_capture_health_check


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """A hook beside our own is registered for its steps, or a profiler runs.

    Where not, torch's wrapper (`Optimizer.profile_hook_step`) does nothing but take 7 us a step.
    """
    return bool(_BEFORE or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
                or len(_AFTER) != 1 or STEP_HOOK.id not in _AFTER or _profiler_enabled())
