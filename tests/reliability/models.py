"""Tiny models of several architectures, and a training step on any of them."""

import torch
from torch import nn

from alps_kernels.layout import find_heads
from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import HeadSelection

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
             vocab_size=61, pad_token_id=0)
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "phi3": SIZES,
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=32),
    "gpt_neox": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61),
    "bert": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=61,
                 is_decoder=True),
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **sizes) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**FAMILIES[family], **sizes})).to(dtype).eval()


def some_heads(model: nn.Module, seed: int = 1, **options) -> HeadSelection:
    return HeadSelection.random(find_heads(model), 0.4, seed=seed, **{"parts": ("q", "k", "v", "o"), **options})


def optimizer_of(model: nn.Module, heads: HeadSelection, rest: str = "frozen", **options) -> HeadAdamW:
    heads.freeze(model, rest=rest)
    return HeadAdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, "heads": heads.bind(model), **options})


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens, labels=tokens).loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    """`steps` ordinary steps; step i has the data of `first + i`, whatever went before."""
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, i).backward()
        optimizer.step()


def bytes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def state_of(optimizer: torch.optim.Optimizer) -> dict:
    """A deep copy of the state by parameter number."""
    return {i: {key: value.clone() for key, value in entry.items()}
            for i, entry in optimizer.state_dict()["state"].items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every byte."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8))


def assert_same(a: dict, b: dict) -> None:
    """Two dicts (of dicts) of tensors, equal in every byte."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        else:
            assert same(value, b[key]), f"{key} differs"
