"""Worlds of gloo ranks on the CPU: one world runs many checks, and each check is a test of its own.

A check is a module-level function of (rank, world, folder) that returns a list of problems: it
does all its collectives before it looks at anything, so that no rank waits for one that gave up.
"""

import json
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
           "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"]


def run(world, checks, folder, patience=60):
    """{name: problems of all ranks} of the checks ({name: function}), run in order by one world.

    A rank waits `patience` seconds for the others.
    """
    context = multiprocessing.get_context("forkserver")  # its server imports once, for every world
    context.set_forkserver_preload(PRELOAD)
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as meeting:
        ranks = [context.Process(target=_rank, args=(rank, world, checks, folder, f"file://{meeting}/store", patience))
                 for rank in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(30 + patience + 20 * len(checks))
            if process.is_alive():
                process.kill()
    found = {}
    for name in checks:
        said = [folder / f"{name}.{world}.{rank}.json" for rank in range(world)]
        found[name] = [f"rank {rank}: {line}" for rank, path in enumerate(said)
                       for line in (json.loads(path.read_text()) if path.is_file() else ["did not get here"])]
    return found


def _rank(rank, world, checks, folder, meeting, patience):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world,
                            timeout=timedelta(seconds=patience))
    for name, check in checks.items():
        try:
            torch.manual_seed(0)
            problems = check(rank, world, folder)
        except BaseException:  # the traceback is the report
            problems = [traceback.format_exc()]
        (folder / f"{name}.{world}.{rank}.json").write_text(json.dumps(problems))
    if dist.is_initialized():  # else a check ended the group itself
        dist.destroy_process_group()
