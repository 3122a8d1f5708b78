"""What torch puts around a step of an optimizer, left away where nobody sees it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim import optimizer as torchs

from ..tensors import STEP_HOOK, sync_after_step, sync_leaves

# Private to torch: where they are not found, every step takes torch's way.
_BEFORE = getattr(torchs, "_global_optimizer_pre_hooks", None)
_AFTER = getattr(torchs, "_global_optimizer_post_hooks", None)
# torch's check of capturable groups in a capture, renamed since 2.9
check_capture = getattr(torchs.Optimizer, "_accelerator_graph_capture_health_check", None) \
    or torchs.Optimizer._cuda_graph_capture_health_check


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """A hook of its own, one before every step, or a profiler wants torch's wrapper (`Optimizer.profile_hook_step`).

    Where not, that does nothing in 7 us a step but call the hooks after every step: `after_step` does.
    """
    return bool(_BEFORE is None or _AFTER is None or _BEFORE or optimizer._optimizer_step_pre_hooks
                or optimizer._optimizer_step_post_hooks or _profiler_enabled())


def after_step(optimizer: torch.optim.Optimizer, leaves: list[Tensor] | None) -> None:
    """Call the hooks that torch calls after a step of any optimizer.

    Args:
        leaves: those that the step moved and whose full weights it did not write; None: not known.
    """
    for key, hook in _AFTER.items():
        if key != STEP_HOOK.id:
            hook(optimizer, (optimizer,), {})
        elif leaves is None:
            sync_after_step(optimizer)
        elif leaves:
            sync_leaves(leaves)
