"""A tenth of SmolLM2's heads learns short sums on every device of a machine, with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py --output out/ddp

What the ranks send each other is the gradient of the selected slices and nothing else.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/ddp")
parser.add_argument("--heads", help="a file that `alps score --heads` wrote; without it random heads train")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch", type=int, default=16, help="rows of a step, over all ranks")
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
bound = alps.slice_heads(model, heads)  # before DDP
replica = DistributedDataParallel(model)
optimizer = alps.HeadAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, heads=bound)

train, _ = chain_sum.split(n_train=4000, n_test=32)
for step in range(options.steps):
    rows = train[step * options.batch + rank:(step + 1) * options.batch:world]
    loss = replica(**{key: value.to(device) for key, value in chain_sum.collate(tokenizer, rows).items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(loss.detach())
    if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
        print(f"step {step}: loss {loss.item() / world:.4f}", flush=True)

if rank == 0:
    print(bound)
    alps.unslice_heads(model).save_pretrained(options.output)
dist.destroy_process_group()
