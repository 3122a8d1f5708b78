"""A tenth of SmolLM2's heads learns short sums on one device, with gradients of those heads alone.

    python examples/single_device.py --output out/heads        # SmolLM2-135M, 60 steps
    python examples/single_device.py --output out/heads --tiny # a random model, seconds, no network

Prints the loss, and what the gradients and the optimizer's state came to; leaves an ordinary
checkpoint for `from_pretrained`.
"""

import argparse

import torch

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, state_bytes, tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/heads")
parser.add_argument("--heads", help="a file that `alps score --heads` wrote; without it random heads train")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--tiny", action="store_true", help="a random model that needs no network")
options = parser.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model, tokenizer = tiny_model() if options.tiny else smollm2()
model.to(device)

heads = (alps.HeadSelection.load(options.heads) if options.heads
         else alps.HeadSelection.random(alps.find_heads(model), 0.10))
bound = alps.slice_heads(model, heads)
optimizer = alps.HeadAdamW(model.parameters(), lr=3e-4, weight_decay=0.1, heads=bound)  # or any of torch.optim's

train, _ = chain_sum.split(n_train=4000, n_test=32)
for step in range(options.steps):
    rows = train[step * options.batch:(step + 1) * options.batch]
    loss = model(**{key: value.to(device) for key, value in chain_sum.collate(tokenizer, rows).items()}).loss
    loss.backward()
    grads = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == options.steps - 1:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

print(bound)
print(f"gradients {grads:,} bytes, optimizer state {state_bytes(optimizer):,} bytes")
alps.unslice_heads(model).save_pretrained(options.output)
