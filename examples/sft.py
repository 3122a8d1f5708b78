"""The paper's loop in TRL's SFTTrainer: a cheap task model, the scores, then the base on its top heads alone.

    python examples/sft.py --output out/sft      # again, and it goes on where it was stopped
"""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/sft")
parser.add_argument("--steps", type=int, default=40, help="of each of the two runs")
parser.add_argument("--tiny", action="store_true", help="a random model that needs no network")
options = parser.parse_args()

torch.manual_seed(0)
model, tokenizer = tiny_model() if options.tiny else smollm2()
train, test = chain_sum.split(n_train=4000, n_test=32)
data = Dataset.from_dict({"prompt": [problem.prompt for problem in train],
                          "completion": [" " + problem.answer for problem in train]})

run = alps.alps_finetune(
    model, data, options.output, trainer=SFTTrainer, processing_class=tokenizer, sliced=True,
    args=alps.paper_arguments(  # the paper's recipe, but for what suits a short run on one device
        options.output, SFTConfig, max_steps=options.steps, save_steps=options.steps // 2, learning_rate=3e-4,
        per_device_train_batch_size=16, gradient_accumulation_steps=1, logging_steps=10, bf16=False))

print(run.scores)
print(run.heads)
print(f"{chain_sum.exact_match(run.model, tokenizer, test):.1%} of {len(test)} held-out sums")
