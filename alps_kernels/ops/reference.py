"""The meaning of every op in plain PyTorch: CPU backend, test oracle and rival of the kernels."""

from .reference_adamw import head_adamw_, head_grad_norm
from .reference_grad import head_grad
from .reference_scoring import head_delta, head_delta_projection

__all__ = ["head_adamw_", "head_delta", "head_delta_projection", "head_grad", "head_grad_norm"]
