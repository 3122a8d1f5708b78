"""Other people's AdamWs on a tensor that trains whole: each with the reason where it cannot run here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bench.timing import Unavailable

OPTIONS = {"lr": 2e-5, "weight_decay": 0.1}


def _torch_fused(params):
    return torch.optim.AdamW(params, fused=True, **OPTIONS)


def _torch_foreach(params):
    return torch.optim.AdamW(params, foreach=True, **OPTIONS)


def _optimi(params):
    import optimi

    return optimi.AdamW(params, **OPTIONS)


def _flashoptim(params):
    import flashoptim

    return flashoptim.FlashAdamW(params, **OPTIONS)


def _bnb(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW(params, **OPTIONS)


def _bnb_8bit(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **OPTIONS)


def _torchao_8bit(params):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **OPTIONS)


def _torchao_8bit_stochastic(params):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, bf16_stochastic_round=True, **OPTIONS)


# By the name in the tables; the package that pip installs.
BASELINES: dict[str, tuple[str, Callable]] = {
    "torch AdamW fused": ("torch", _torch_fused),
    "torch AdamW foreach": ("torch", _torch_foreach),
    "torch-optimi AdamW": ("torch-optimi", _optimi),
    "flashoptim FlashAdamW": ("flashoptim", _flashoptim),
    "bitsandbytes AdamW": ("bitsandbytes", _bnb),
    "bitsandbytes AdamW8bit": ("bitsandbytes", _bnb_8bit),
    "torchao AdamW8bit": ("torchao", _torchao_8bit),
    "torchao AdamW8bit, bf16 stochastic": ("torchao", _torchao_8bit_stochastic),
}
EIGHT_BIT = tuple(name for name in BASELINES if "8bit" in name)


def baseline(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer called `name` over `params`, after one step of it on a small tensor like theirs.

    Raises:
        Unavailable: its package is not installed, or that step fails on this device.
    """
    package, build = BASELINES[name]
    like = params[0]
    try:
        trial = nn.Parameter(torch.zeros(64 * 256, dtype=like.dtype, device=like.device))
        trial.grad = torch.ones_like(trial)
        build([trial]).step()
        return build(params)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError)
        raise Unavailable(f"{package} is not installed" if absent else f"{package}: {error}") from error
    except (NotImplementedError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"{package} on {like.device.type}, {str(like.dtype)[6:]}: {said[0]}") from error
