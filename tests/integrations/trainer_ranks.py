"""One rank of a Trainer run: `torchrun --nproc-per-node 2 -m tests.integrations.trainer_ranks FOLDER`."""

import os
import sys
from pathlib import Path

import torch

import alps_kernels as alps

from .cases import adamw, arguments, data, model, some_heads, trainer


def run(name: str, folder: Path, resume: str | None = None) -> dict:
    of = model()
    made = trainer(of, folder, ddp_backend="gloo", per_device_train_batch_size=2, max_steps=5, save_steps=2,
                   save_strategy="no" if resume else "steps")
    alps.use_heads(made, some_heads(of) if name == "heads" else alps.AlpsCallback(0.125, 3))
    made.train(resume_from_checkpoint=resume and str(folder / resume))
    bound = adamw(made).heads
    return {"model": of.state_dict(), "heads": list(bound.selection), "numel": bound.numel,
            "losses": [row["loss"] for row in made.state.log_history if "loss" in row]}


def main(folder: Path) -> None:
    whole = {name: run(name, folder / name) for name in ("heads", "one run")}
    resumed = {name: run(name, folder / name, "checkpoint-2") for name in whole}
    two = alps.alps_finetune(model(), data(), folder / "two runs", task_share=0.5, ratio=0.125, args=arguments(
        folder, ddp_backend="gloo", per_device_train_batch_size=2, max_steps=2, save_strategy="no"))
    torch.save({"whole": whole, "resumed": resumed, "two runs": (two.model.state_dict(), list(two.heads))}, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
