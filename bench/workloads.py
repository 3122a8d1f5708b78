"""Models whose training step is counted or timed, prepared for each way to fine-tune them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from alps_kernels import HeadSelection, find_heads
from bench.finetune_methods import FINETUNE_METHODS, Ready
from bench.shapes import SHAPES


@dataclass
class Workload:
    """A model, and the loss of one step of it.

    Attributes:
        name: with its conditions.
        make: a fresh model.
        loss: the loss of that model.
        tokens: rows of every activation; no other size of the model is equal to it.
        dtype: of the weights.
        absent: methods that cannot run here, and why.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    tokens: int
    dtype: torch.dtype
    absent: dict[str, str] = field(default_factory=dict)


def smollm2(layers: int | None = None, device: str = "cpu", batch: int = 2, length: int = 128) -> Workload:
    """The real model, or its configuration with random weights where it cannot be fetched; float32."""
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from alps_kernels.demo import assets

    disable_progress_bar()
    shape, folder = SHAPES["SmolLM2-135M"], None
    try:
        folder = assets.smollm2()
    except assets.AssetUnavailable as error:
        print(f"SmolLM2-135M with random weights: {error}")
    config = AutoConfig.from_pretrained(folder) if folder else LlamaConfig(
        vocab_size=49152, hidden_size=shape.hidden, intermediate_size=1536, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.groups, head_dim=shape.head_dim,
        tie_word_embeddings=True)
    n_layers = min(layers or shape.layers, shape.layers)
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

    def make() -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32) if folder else LlamaForCausalLM(config)
        model.model.layers = model.model.layers[:n_layers]
        return model.to(device).train()

    name = f"SmolLM2-135M{'' if folder else ' (random weights)'}, {n_layers} of {shape.layers} layers, float32"
    return Workload(f"{name}, {batch} x {length} tokens, {device}", make,
                    lambda model: model(input_ids=ids, labels=ids).loss, batch * length, torch.float32)


def llama8b(layers: int | None = None, device: str = "meta", length: int = 2048) -> Workload:
    """The decoder layers alone: random weights, no embedding, no vocabulary, the loss a mean of squares; bfloat16."""
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    shape, meta = SHAPES["Llama-3.1-8B"], device == "meta"
    AttentionInterface.register("counted", _counted_attention)
    n_layers = min(layers or shape.layers, shape.layers)
    config = LlamaConfig(vocab_size=32, hidden_size=shape.hidden, intermediate_size=14336, num_hidden_layers=n_layers,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.groups, head_dim=shape.head_dim,
                         attn_implementation="counted" if meta else "sdpa")

    def make() -> nn.Module:
        with torch.device(device):
            model = LlamaModel(config).to(torch.bfloat16).train()
        del model.embed_tokens
        return model

    def loss(model: nn.Module) -> Tensor:
        inner = getattr(model, "base_model", model)  # PEFT wraps twice
        inner = getattr(inner, "model", inner)
        hidden = torch.ones(1, length, shape.hidden, dtype=torch.bfloat16, device=device)
        # Layer by layer: the model's own forward looks into its masks, and on the meta device is nothing to see.
        turns = inner.rotary_emb(hidden, torch.arange(length, device=device)[None])
        for layer in inner.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=turns)
        return inner.norm(hidden).float().square().mean()

    name = f"Llama-3.1-8B layer stack, {n_layers} of {shape.layers} layers, bfloat16, 1 x {length} tokens, {device}"
    absent = {"SHiRA": "PEFT looks for the mask's elements, which the meta device does not have"} if meta else {}
    return Workload(name, make, loss, length, torch.bfloat16, absent)


WORKLOADS = {"smollm2": smollm2, "llama8b": llama8b}


def prepared(workload: Workload, method: str, ratio: float) -> Ready:
    """The method's model for random heads at the ratio, the same heads for every method."""
    torch.manual_seed(0)
    model = workload.make()
    return FINETUNE_METHODS[method](model, HeadSelection.random(find_heads(model), ratio, seed=0))


def _counted_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, dropout=0.0,
                       **ignored):
    """Causal attention by the operator that the CPU runs: on the meta device torch would take the one that keeps
    the whole [tokens, tokens] matrix, which no training run does.

    query [batch, heads, tokens, head_dim], key and value [batch, groups, tokens, head_dim].
    """
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout, True, scale=scaling)[0]
    return rearrange(out, "batch head token d -> batch token head d"), None
