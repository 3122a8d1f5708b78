"""A card that is not there: what the benchmarks call of torch.cuda, on the CPU, with a clock of its own.

A captured call runs once, a replay runs nothing, and the time between two events is what the test sets. Tensors stay
on the CPU.
"""

from contextlib import contextmanager

import torch

from bench import common, timing


class FakeCard:
    """Patches what is needed; `ms` is the time between any two events, `done` what was asked of the card."""

    def __init__(self, monkeypatch, ms=2.0):
        self.ms, self.done, self.fails = ms, [], None
        card = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                card.done.append("event")

            def elapsed_time(self, other):
                return card.ms

        class Stream:
            def wait_stream(self, other):
                pass

        class Graph:
            def replay(self):
                card.done.append("replay")

        @contextmanager
        def graph(_):
            if card.fails:
                raise card.fails
            card.done.append("capture")
            yield

        @contextmanager
        def stream(_):
            yield

        fakes = {"Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream,
                 "current_stream": Stream, "synchronize": lambda: None, "empty_cache": lambda: None,
                 "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 0,
                 "max_memory_allocated": lambda: 2**20}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "CUDA", True)
        monkeypatch.setattr(timing, "launches", lambda call: 1)
        monkeypatch.setattr(common, "device_name", lambda: "NVIDIA Fake")
