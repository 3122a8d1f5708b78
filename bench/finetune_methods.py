"""Ways to fine-tune heads or something like them: what each does to a model, and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from alps_kernels import HeadAdamW, HeadSelection

OPTIONS = {"lr": 2e-5, "weight_decay": 0.1}
LORA, SLICED = "LoRA r=128", "slice_heads + HeadAdamW"
TARGETS = ["q_proj", "k_proj", "v_proj"]


@dataclass
class Ready:
    """A model that is ready to train: `model` holds the parameters, `trained` counts the elements that move."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: int


def nothing(model: nn.Module, heads: HeadSelection) -> Ready:
    """The frozen model: what a forward pass costs."""
    return Ready(model.requires_grad_(False), torch.optim.AdamW([nn.Parameter(torch.zeros(1))]), 0)


def everything(model: nn.Module, heads: HeadSelection) -> Ready:
    return Ready(model, torch.optim.AdamW(model.parameters(), **OPTIONS), sum(p.numel() for p in model.parameters()))


def gradient_mask(model: nn.Module, heads: HeadSelection) -> Ready:
    """What the method's authors do: hooks zero the other heads' gradients; AdamW runs over all of q, k and v."""
    bound = {part.name: part for part in heads.bind(model).params}
    model.requires_grad_(False)
    params = []
    for name, param in model.named_parameters():
        if not any(f".{target}." in name for target in TARGETS):
            continue
        mask = torch.zeros_like(param)
        for block in bound[name].blocks(mask) if name in bound else ():
            block.fill_(1)
        param.requires_grad_(True).register_hook(mask.mul)
        params.append(param)
    return Ready(model, torch.optim.AdamW(params, **OPTIONS), sum(part.numel for part in bound.values()))


def lora(model: nn.Module, heads: HeadSelection, rank: int = 128) -> Ready:
    peft = _peft()
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    # Adapters in the model's dtype: PEFT's default of float32 adapters would cost it more.
    return _adapted(peft.get_peft_model(model, config, autocast_adapter_dtype=False))


def shira(model: nn.Module, heads: HeadSelection) -> Ready:
    """As many random elements of q, k and v as the selection trains, to within a rank's worth."""
    peft = _peft()
    sizes = [sum(p.shape) for n, p in model.named_parameters() if any(f".{t}.weight" in n for t in TARGETS)]
    rank = max(1, round(heads.bind(model).numel / sum(sizes)))
    return _adapted(peft.get_peft_model(model, peft.ShiraConfig(r=rank, target_modules=TARGETS),
                                        autocast_adapter_dtype=False))


def unsliced(model: nn.Module, heads: HeadSelection) -> Ready:
    bound = heads.freeze(model)
    return Ready(model, HeadAdamW(model.parameters(), heads=bound, **OPTIONS), bound.numel)


def sliced(model: nn.Module, heads: HeadSelection) -> Ready:
    from alps_kernels import slice_heads

    slice_heads(model, heads)
    bound = heads.bind(model)
    return Ready(model, HeadAdamW(model.parameters(), heads=bound, **OPTIONS), bound.numel)


def _adapted(model: nn.Module) -> Ready:
    params = [p for p in model.parameters() if p.requires_grad]
    return Ready(model, torch.optim.AdamW(params, **OPTIONS), sum(p.numel() for p in params))


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA and SHiRA are PEFT's: pip install 'alps-kernels[bench]'") from error
    return peft


FINETUNE_METHODS: dict[str, Callable[[nn.Module, HeadSelection], Ready]] = {
    "frozen model": nothing,
    "full fine-tuning": everything,
    "gradient mask, AdamW": gradient_mask,
    LORA: lora,
    "SHiRA": shira,
    "HeadAdamW": unsliced,
    SLICED: sliced,
}
