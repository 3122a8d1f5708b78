"""Work on the CPU spread over Python threads, each with memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from threading import local
from typing import Any, TypeVar

import torch
from torch import Tensor

MOST = 8  # Python threads: the interpreter's lock feeds no more; beyond it each is given several of torch's
Job, Result = TypeVar("Job"), TypeVar("Result")


class Workers:
    """`spread` maps a function over jobs; `scratch` is memory of the calling thread."""

    def __init__(self, pool: ThreadPoolExecutor | None, count: int) -> None:
        self._pool, self._count, self._local = pool, count, local()

    def spread(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
        """The results in the order of the jobs; the first job that fails raises.

        The calling thread takes its share: one that only handed jobs out would wait milliseconds for the
        interpreter's lock, and the others for it.
        """
        todo, done, failed = iter([*enumerate(jobs)]), {}, {}

        @torch.no_grad()  # each thread has a switch of its own
        def share(_: Any = None) -> None:
            for i, job in todo:
                try:
                    done[i] = work(job)
                except BaseException as error:
                    failed[i] = error
                if failed:
                    return

        others = self._pool.map(share, range(min(self._count, len(jobs)) - 1)) if self._pool else ()
        share()
        list(others)
        if failed:
            raise failed[min(failed)]
        return [done[i] for i in range(len(jobs))]

    def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        """Uninitialised memory, overwritten when this thread next asks for it by this name."""
        held, size = vars(self._local), prod(shape)
        key = name, dtype, device
        if key not in held or held[key].numel() < size:
            held[key] = torch.empty(size, dtype=dtype, device=device)
        return held[key][:size].view(shape)

    def counted(self, n: int, device: torch.device) -> Tensor:
        """1, 2, ..., n in float32; the thread keeps them."""
        held = vars(self._local).get("counted")
        if held is None or len(held) < n:
            held = self._local.counted = torch.arange(1.0, n + 1, dtype=torch.float32, device=device)
        return held[:n]


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """As many threads as torch gives one operator; one thread each where there are at most `MOST`.

    An operator that torch itself spreads waits for its slowest core, of every few microseconds anew;
    heads spread over threads wait once a layer.
    """
    threads = torch.get_num_threads()
    count = min(threads, MOST) if device.type == "cpu" else 1
    if count == 1:
        yield Workers(None, 1)
        return
    try:
        torch.set_num_threads(threads // count)
        with ThreadPoolExecutor(count - 1, "score", torch.set_num_threads, (threads // count,)) as pool:
            yield Workers(pool, count)
    finally:
        torch.set_num_threads(threads)
