"""The host's time of a warm step of 128 tensors on the stand-in driver, over what reading their gradients takes.

    python -m tests.optim.host_time [--write]

Reading: every gradient, its address and its version, in plain Python. A ratio of one run says something on a busy
machine too; the tests count calls and launches and assert no time. --write adds rows to bench/results/host_time.csv.
"""

import itertools
import sys
import time
import warnings

import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.optim.first_steps import FIRST_STEPS
from alps_kernels.selection import BoundParam
from bench.common import percentiles, write_rows
from tests.support.fake_driver import driver

from .cases import bind, sliced_module

N = 128


def whole():
    params = [nn.Parameter(torch.randn(32, 32).bfloat16()) for _ in range(N)]
    return params, bind(*(BoundParam(str(i), p, i % 2, ((8, 24),)) for i, p in enumerate(params)))


def sliced():
    modules = [sliced_module(torch.randn(32, 32).bfloat16(), i % 2, ((8, 24),)) for i in range(N)]
    return [module.weight_slice for module in modules], None, modules


def read(params):
    grads = [p.grad for p in params]
    return [grad.data_ptr() for grad in grads], [grad._version for grad in grads]


def timed(call, before=lambda: None, repeats=800):
    """Percentiles of a call's time, in ms."""
    times = []
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return percentiles(times)


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{N} tensors, torch {torch.__version__}; 20th percentiles in us, and their ratio to reading\n")
    rows = []
    for name, make, options in (
        ("a step", whole, {}), ("clipped", whole, {"max_grad_norm": 1.0}), ("capturable", whole, {"capturable": True}),
        ("a step of sliced projections", sliced, {}),
    ):
        with driver(checks=False):
            params, bound, *alive = make()
            optimizer = HeadAdamW(params, heads=bound, **options)
            sets = itertools.cycle([[torch.ones_like(p) for p in params] for _ in range(2)])

            def move(params=params, sets=sets):
                for param, grad in zip(params, next(sets), strict=True):
                    param.grad = grad

            move()
            for _ in range(FIRST_STEPS + 3):
                optimizer.step()
            base = timed(lambda params=params: read(params))
            took = {"reading": base, "gradients where they were": timed(optimizer.step),
                    "gradients elsewhere": timed(optimizer.step, move)}
        for rival, times in took.items():
            ratio = times["p20_ms"] / base["p20_ms"]
            print(f"{name:30s} {rival:26s} {1e3 * times['p20_ms']:6.1f}  {ratio:.2f}")
            rows.append({"case": f"{name}, {N} tensors, stand-in for CUDA's driver", "rival": rival, **times,
                         "ratio": ratio, "note": "host's time alone; ratio: 20th percentiles, over reading"})
    if "--write" in sys.argv:
        print(write_rows("host_time", rows))


if __name__ == "__main__":
    main()
