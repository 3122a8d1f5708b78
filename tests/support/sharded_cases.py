"""Tiny models sharded by FSDP2, the same on one process, and equal gradients for both."""

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import alps_kernels as alps
from alps_kernels.tensors import local_bounds, local_part

from ..optim.cases import same_bytes

# k and v have 6 rows: on 4 ranks 2, 2, 2 and none. The vocabulary of 29 rows: 8, 8, 8 and 5.
LLAMA = dict(vocab_size=29, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=1, head_dim=6, max_position_embeddings=32)
GPT2 = dict(vocab_size=29, n_embd=12, n_layer=2, n_head=3, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=1)
HEADS = {"llama": [[(0, 1), (2, 0), (2, 3)], [(0, 1), (1, 2), (2, 3)]], "gpt2": [[(0, 1), (1, 0), (1, 2)], [(0, 1), (0, 2), (1, 2)]]}


def model_of(kind, dtype=torch.float32):
    torch.manual_seed(3)
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_bias=True))
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    return model.to(dtype)


def blocks_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def shard(model, mesh=None, **options):
    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def heads_of(kind, model, which=0, **options):
    return alps.HeadSelection(HEADS[kind][which], alps.find_heads(model).heads_per_layer,
                              **{"parts": ("q", "k", "v", "o"), **options})


def cut_like(param, whole):
    """This rank's share of `whole`, by this file's own count of rows."""
    if not isinstance(param, DTensor):
        return whole
    for axis, placement in enumerate(param.placements):
        if placement.is_shard():
            pieces = whole.chunk(param.device_mesh.size(axis), placement.dim)
            rank = param.device_mesh.get_local_rank(axis)
            whole = pieces[rank] if rank < len(pieces) else whole.narrow(placement.dim, 0, 0)
    return whole


def set_grads(model, generator, bound, scale=1.0):
    """The same gradients on one process and on many; NaN where nothing trains."""
    chosen = {part.name: part for part in bound.params}
    for name, param in model.named_parameters():
        whole = torch.randn(param.shape, generator=generator) * scale
        inside = torch.zeros(param.shape, dtype=torch.bool)
        if name in chosen:
            part = chosen[name]
            rows = inside.view(inside.shape[0], -1)
            for start, stop in part.ranges:
                rows.narrow(part.dim, start, stop - start).fill_(True)
        whole = torch.where(inside, whole, float("nan")).to(param.dtype)
        if not isinstance(param, DTensor):
            param.grad = whole if name in chosen else None
        elif name in chosen:
            param.grad = DTensor.from_local(cut_like(param, whole).clone(), param.device_mesh, param.placements,
                                            run_check=False, shape=param.shape, stride=param.stride())
        else:
            param.grad = None


def differences(sharded, plain):
    """Parameters whose shard is not the bytes of the plain one's."""
    others = dict(plain.named_parameters())
    return [f"{name} differs: {local_part(p).detach().flatten()[:4]} {local_bounds(p)}" for name, p in sharded.named_parameters()
            if not same_bytes(local_part(p).detach(), cut_like(p, others[name].detach()))]
