"""Tiny models and data for runs of transformers' Trainer."""

import functools

import torch
from transformers import (
    BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
    LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM, T5Config,
    T5ForConditionalGeneration, Trainer, TrainingArguments,
)

import alps_kernels as alps
from alps_kernels.integrations import unwrap_optimizer

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**GROUPED)),
    "phi3": (Phi3ForCausalLM, Phi3Config(**GROUPED, pad_token_id=0)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
    "bert": (BertForMaskedLM, BertConfig(**SIZES)),
    "t5": (T5ForConditionalGeneration, T5Config(vocab_size=48, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                                                decoder_start_token_id=0)),
}


def model(kind="llama", dtype=torch.float32, seed=0):
    cls, config = MODELS[kind]
    torch.manual_seed(seed)
    made = cls(config)
    with torch.no_grad():  # initial biases are zeros, and a zero does not show what decays or is restored
        for param in made.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    return made.to(dtype)


@functools.cache
def data(n=48, width=10):
    ids = torch.randint(1, 48, (n, width), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, *, checkpointing=None, **changes):
    if checkpointing is not None:  # gradient_checkpointing has another name since transformers 5.24
        new = "activation_checkpointing"
        changes[new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"] = checkpointing
    return TrainingArguments(str(folder), **{
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1, "save_steps": 1,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "cosine",
        "warmup_steps": 1, **changes})


def trainer(of, folder, cls=Trainer, callbacks=None, optimizer=None, eval_dataset=None, **changes):
    return cls(of, arguments(folder, **changes), train_dataset=data(), callbacks=callbacks,
               optimizer_cls_and_kwargs=optimizer, eval_dataset=eval_dataset)


def some_heads(of, **options):
    """Head 1 of the first layer and the last of the last."""
    layout = alps.find_heads(of)
    last = len(layout.layers) - 1
    return alps.HeadSelection([(0, 1), (last, layout.heads_per_layer[last] - 1)], layout.heads_per_layer,
                              summary=layout.summary(), **options)


def same_bytes(a, b):
    a, b = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def assert_same(first, second):
    """Every byte of two models, or of two nested states, is the same."""
    if isinstance(first, torch.nn.Module):
        first, second = first.state_dict(), second.state_dict()
    assert type(first) is type(second), f"{type(first)} and {type(second)}"
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and same_bytes(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def assert_only_moved(now, before, bound):
    """Outside `bound` every byte of `now` is that of `before`; inside every range something moved."""
    parts = {part.name: part for part in bound.params}
    old = dict(before.named_parameters())
    for name, param in now.named_parameters():
        moved = param.detach() != old[name].detach()
        if name in parts:
            for block in parts[name].blocks(moved):
                assert block.any(), f"a selected range of {name} did not move"
                block.fill_(False)
        assert not moved.any(), f"{name} moved outside the selection"


def adamw(trained):
    """The HeadAdamW inside the Trainer."""
    return unwrap_optimizer(trained.optimizer)
