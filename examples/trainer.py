"""SmolLM2 learns short sums in transformers' Trainer: all heads for a while, then the tenth that moved most.

    python examples/trainer.py --output out/trainer
    python examples/trainer.py --output out/trainer --resume      # goes on from its last checkpoint
"""

import argparse

import torch
from transformers import Trainer, TrainingArguments

import alps_kernels as alps
from alps_kernels.demo import chain_sum
from alps_kernels.demo.run import smollm2, tiny_model

parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/trainer")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--warmup", type=int, default=20, help="steps on all heads before they are scored")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--tiny", action="store_true", help="a random model that needs no network")
options = parser.parse_args()

torch.manual_seed(0)
model, tokenizer = tiny_model() if options.tiny else smollm2()
train, test = chain_sum.split(n_train=4000, n_test=32)

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output, max_steps=options.steps, save_steps=options.warmup, per_device_train_batch_size=16,
        learning_rate=3e-4, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=0.1, logging_steps=10,
        save_total_limit=2, remove_unused_columns=False, report_to=[]),
    train_dataset=train,
    data_collator=lambda problems: chain_sum.collate(tokenizer, problems),
)
callback = alps.AlpsCallback(ratio=0.10, warmup_steps=options.warmup)
alps.use_heads(trainer, callback)
trainer.train(resume_from_checkpoint=options.resume)

print(callback.heads)
print(f"{chain_sum.exact_match(model, tokenizer, test):.1%} of {len(test)} held-out sums")
trainer.save_model(options.output)
