"""The host's time of `head_delta` for the q/k/v of a Llama-3.1-8B bf16 pair, and what it asks of a device.

    python -m tests.scoring.host_time [--against FOLDER] [--write]

Launches of kernels do nothing, and no weight is read: what is timed is Python's and torch's work around them, which a
GPU must wait for. Reading: every matrix's address, shape and strides in plain Python. The ratio of the other rows is
their time over that. `score_heads` is not timed; what it asks of a device is counted. --against adds another checkout
of this project under the name of its folder, timed in turn with this one. --write adds rows to
bench/results/host_time.csv. Tests count what is asked of a device (`asked`), and assert no time.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from alps_kernels import score_heads
from alps_kernels.ops import METRICS, Segment, head_delta
from alps_kernels.ops.delta import op, tables
from alps_kernels.scoring import score
from alps_kernels.weights import ModelWeights
from bench.common import percentiles, write_rows

ROOT = Path(__file__).resolve().parents[2]
CASE = "q/k/v of a Llama-3.1-8B bf16 pair, 1024 heads, launches that do nothing"
METRIC_LISTS = {"pad": ["pad"], "all metrics": [name for name in METRICS if name != "pad_values"]}
ROUNDS, REPEATS = 8, 12


def layers_of(n, device="cpu"):
    """Segments of n layers. The memory is never touched, so it costs addresses alone."""
    heads, group = tuple(range(32)), tuple(head // 4 for head in range(32))
    return [tuple(Segment(*(torch.empty(len(set(index)), 128, 4096, dtype=torch.bfloat16, device=device)
                            for _ in range(2)), index) for index in (heads, group, group)) for _ in range(n)]


@contextlib.contextmanager
def without_kernels():
    """Launches are counted and do nothing; no head is doubtful, whatever its sums are then."""
    launched, doubtful = Counter(), tables.Sums.doubtful

    def launch(kernel, *args, **options):
        launched[kernel.__name__] += 1

    with mock.patch.object(JITFunction, "run", launch), mock.patch.object(
            tables.Sums, "doubtful", lambda *args: torch.zeros_like(doubtful(*args))):
        yield launched


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Asked(TorchDispatchMode):
    """Count what torch asks of a device, for which "meta" stands: launches, copies, and waits for a result."""

    def __init__(self):
        super().__init__()
        self.count = Counter(launches=0, uploads=0, downloads=0, waits=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        there = [tensor.is_meta for tensor in tensors_in((args, kwargs))]
        if any(there) and name in ("aten::equal", "aten::_local_scalar_dense"):
            self.count["waits"] += 1
            return name != "aten::equal"
        if any(there) and name == "aten::nonzero":
            self.count["waits"] += 1
            return args[0].new_zeros(0, args[0].ndim, dtype=torch.int64)
        if any(there) and name == "aten::_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.count.update(downloads=1, waits=1)
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        found = func(*args, **kwargs)
        written = any(tensor.is_meta for tensor in tensors_in(found))
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if written and not views and not name.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.count["uploads" if name in ("aten::copy_", "aten::_to_copy") and not all(there) else "launches"] += 1
        return found


def public_of(n, **options):
    """A call of `score_heads` on two models of n layers that have no values."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=32, hidden_size=4096, intermediate_size=32, num_hidden_layers=n,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    with torch.device("meta"):
        base, task = (LlamaModel(config).bfloat16().eval() for _ in range(2))

    def call():
        with contextlib.ExitStack() as patches:  # as on a GPU
            patches.enter_context(mock.patch.object(ModelWeights, "prepare", lambda *args: None))
            patches.enter_context(mock.patch.object(score._Reader, "together", float("inf")))
            patches.enter_context(mock.patch.object(op, "runs_kernels", lambda tensor: True))
            return score_heads(base, task, **options)

    return call


def asked(call):
    """What one call asks of a device: kernels of Triton by name, and torch's launches, copies and waits."""
    with without_kernels() as launched, Asked() as mode:
        call()
    return {"kernels": sum(launched.values()), **mode.count}


def host_times(call):
    """Times of a call in ms; what only a device would compute is made small first."""
    with contextlib.ExitStack() as patches:
        patches.enter_context(without_kernels())
        if hasattr(tables, "SCANS"):
            patches.enter_context(mock.patch.object(tables, "SCANS", 0))
        else:  # before tiles had a list: tables of every tile of a head
            init = tables.Sums.__init__
            patches.enter_context(mock.patch.object(tables.Sums, "__init__", lambda self, heads, slots, sizes: init(
                self, heads, 1, sizes)))
        call()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return times


def read(layers):
    sides = [side for layer in layers for s in layer for side in (s.base, s.task)]
    return [(side.data_ptr(), side.shape, side.stride()) for side in sides]


def measured():
    """Times and counts of this checkout."""
    torch.set_num_threads(1)
    here, there = layers_of(32), layers_of(32, "meta")
    calls = {name: lambda layers, metrics=metrics: head_delta(layers, metrics, backend="triton")
             for name, metrics in METRIC_LISTS.items()}
    return {"reading": (host_times(lambda: read(here)), {}),
            **{name: (host_times(lambda call=call: call(here)), asked(lambda call=call: call(there)))
               for name, call in calls.items()},
            "score_heads": ([], asked(public_of(32, representation="qkv")))}


def measured_in(folder):
    """The same of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(Path(__file__).resolve()), "--child"], cwd=folder, env=environment,
                         stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ran.stdout)
    if Path(found["package"]).resolve().parents[1] != Path(folder).resolve():
        raise RuntimeError(f"{folder} was to be measured, and {found['package']} was imported: give a checkout's root")
    return found["measured"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout of this project")
    parser.add_argument("--write", action="store_true", help="add rows to bench/results/host_time.csv")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        import alps_kernels

        print(json.dumps({"package": alps_kernels.__file__, "measured": measured()}))
        return
    trees = {"": ROOT} | ({f", {options.against.name}": options.against.resolve()} if options.against else {})
    rounds = [{which: measured_in(folder) for which, folder in trees.items()} for _ in range(ROUNDS)]
    rows, base = [], percentiles([ms for one in rounds for ms in one[""]["reading"][0]])["p20_ms"]
    for which in trees:
        for name, (times, counts) in rounds[0][which].items():
            if which and name == "reading":
                continue
            times = percentiles([ms for one in rounds for ms in one[which][name][0]]) if times else {}
            ratio = times["p20_ms"] / base if times else None
            said = ", ".join(f"{n} {what}" for what, n in counts.items())
            print(f"{name + which:24s}", f"{times['p20_ms']:8.3f} ms  {ratio:7.2f}" if times else " " * 20, said)
            rows.append({"case": CASE, "rival": name + which, **times, "ratio": ratio,
                         "launches": sum(counts.values()) - counts["waits"] if counts else None,
                         "note": said or "ratios: 20th percentiles, over reading"})
    if options.write:
        print(write_rows("host_time", rows))


if __name__ == "__main__":
    main()
