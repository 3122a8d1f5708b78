"""Work shared by the ranks of torch.distributed, its results and errors on all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from .checks import check_type

T = TypeVar("T")


def process_group(distributed: Any) -> Any:
    """The process group meant by an argument `distributed`, True being the default group.

    Raises:
        ValueError: torch.distributed is not initialised.
        TypeError: it is neither True nor a process group.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("distributed scores need torch.distributed: run under torchrun and call"
                         " torch.distributed.init_process_group first")
    if distributed is True:
        return dist.group.WORLD
    check_type("distributed", distributed, dist.ProcessGroup, "True, False or a process group")
    return distributed


def on_all_ranks(group: Any, work: Callable[[int, int], T]) -> list[T]:
    """What `work(rank, number of ranks)` gives on each rank, in their order, on every rank.

    An error of one rank is raised on all of them, so that none waits for a rank that gave up.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    try:
        mine, failed = work(rank, size), None
    except Exception as error:  # whatever it is, the others must hear of it
        mine, failed = None, error
    every: list[Any] = [None] * size
    dist.all_gather_object(every, (mine, failed), group=group)
    if failed is not None:
        raise failed
    for other, (_, error) in enumerate(every):
        if error is not None:
            error.add_note(f"raised on rank {other} of {size}") if hasattr(error, "add_note") else None
            raise error
    return [result for result, _ in every]


@contextmanager
def ranks_of_torchrun() -> Iterator[int | None]:
    """This process's rank among those of torchrun, joined in a gloo group for the block; None without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("gloo")  # what is sent is small and on the CPU
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
