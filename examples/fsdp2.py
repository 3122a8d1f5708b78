"""A tenth of SmolLM2's heads learns short sums with the model sharded over all devices, with FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --output out/fsdp2
    torchrun --standalone --nproc-per-node 4 examples/fsdp2.py --output out/fsdp2 --resume --steps 120

The checkpoint is torch.distributed.checkpoint's, and another number of ranks may go on from it.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/fsdp2")
parser.add_argument("--heads", help="a file that `alps score --heads` wrote; without it random heads train")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch", type=int, default=16, help="rows of a step, over all ranks")
parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
parser.add_argument("--tiny", action="store_true", help="a random model that needs no network")
options = parser.parse_args()

gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
if gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if gpu else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
if rank > 0:
    dist.barrier()  # rank 0 fetches the model for all
model, tokenizer = tiny_model() if options.tiny else smollm2()
if rank == 0:
    dist.barrier()
model.to(device)

heads = (alps.HeadSelection.load(options.heads) if options.heads
         else alps.HeadSelection.random(alps.find_heads(model), 0.10))
alps.slice_heads(model, heads)  # before FSDP2
mesh = init_device_mesh(device.type, (world,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
bound = heads.bind(model)  # after FSDP2, which makes new parameters
optimizer = alps.HeadAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, heads=bound)

checkpoint, first = os.path.join(options.output, "checkpoint"), 0
if options.resume:
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True), step=torch.tensor(0))
    dcp.load(states, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    first = int(states["step"])

train, _ = chain_sum.split(n_train=4000, n_test=32)
for step in range(first, options.steps):
    rows = train[step * options.batch + rank:(step + 1) * options.batch:world]
    loss = model(**{key: value.to(device) for key, value in chain_sum.collate(tokenizer, rows).items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach())
    if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
        print(f"step {step}: loss {loss.item() / world:.4f}", flush=True)

states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True), step=torch.tensor(options.steps))
dcp.save(states, checkpoint_id=checkpoint)
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if rank == 0:
    print(bound)
    model.save_pretrained(options.output, state_dict=whole)
dist.barrier()  # no rank leaves while another still saves
dist.destroy_process_group()
