"""Code of the scoring kernels: every target, no spills, 16-byte loads where it matters; what a call launches."""

import random
import re
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from alps_kernels.ops import Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import tables as delta_tables
from alps_kernels.ops.delta.tables import FLAT_TILE, LANES, STATS
from csrc_triton.head_delta import head_delta_stats_kernel

from ..support.launches import Launch, recorded
from . import offline
from .cases import LAYOUTS, WANTED, score_launches
from .instructions import WAYS, of_a_pair, way

DTYPES = ("bf16", "fp16", "fp32")
KERNELS = {"stats": "head_delta_stats_kernel", "list": "list_tiles_kernel", "scan": "head_delta_scan_kernel"}
PRODUCTS = ("group_products_kernel", "projection_stats_kernel", "list_tiles_kernel", "projection_scan_kernel")


def compiled(which, target="sm_90", *case, **options):
    return score_launches(target, *case, **options)[KERNELS[which]].compile(target)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metrics", WANTED)
def test_a_launch_is_that_of_its_case(layout, metrics):
    for target, lanes in (("sm_90", 32), ("gfx942", 64)):
        launches = score_launches(target, "fp32", "bf16", layout, metrics)
        stats, listing, scan = (launches[name] for name in KERNELS.values())
        for launch in (stats, scan):
            found = {key: str(launch.argument(key)) for key in ("BASE", "TASK", "FLAT")}
            assert found == {"BASE": "fp32", "TASK": "bf16", "FLAT": str(layout == "flat")}
            assert layout != "flat" or launch.argument("LANES") == lanes * launch.argument("num_warps") == lanes
        assert stats.argument("ALL") == listing.argument("ALL") == (metrics == "all")


def check(built):
    """No spills, and 8 warps that an SM holds at once: two for each of its schedulers."""
    what = offline.resources(built), offline.resident(built)
    assert offline.spill_free(built), what
    assert offline.resident(built) * built.metadata.num_warps >= 8, what


# With fewer bytes on the way than its bandwidth asks for: a B200, for all metrics, whose loads wait for registers.
FEW = {("all", "sm_100"): 0.8}


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("metrics", WANTED)
def test_flat_passes_have_the_resources_that_they_need(metrics, target):
    """No spills, and enough programs of one warp each for the memory's bandwidth, whatever registers they take."""
    for which in KERNELS:
        check(compiled(which, target, metrics=metrics))
    stats, scan = (compiled(which, target, metrics=metrics) for which in ("stats", "scan"))
    if target in offline.NVIDIA:
        assert stats.metadata.shared == scan.metadata.shared == 0
        assert offline.in_flight(stats) >= offline.needed(stats) * FEW.get((metrics, target), 1)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("layout", ["tail", "transposed"])
@pytest.mark.parametrize("metrics", WANTED)
def test_other_strides_and_tails_have_the_resources_that_they_need(metrics, layout, target):
    for which in KERNELS:
        check(compiled(which, target, layout=layout, metrics=metrics))


@pytest.mark.parametrize("base, task", [("fp16", "fp16"), ("fp32", "bf16")])
@pytest.mark.parametrize("which", ["stats", "scan"])
def test_other_dtypes_compile(which, base, task):
    for layout in ("flat", "odd"):
        check(compiled(which, "sm_90", base, task, layout=layout))


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("task", DTYPES)
def test_every_variant_compiles_for_every_target_without_spills(task, base, target):
    spilling = [(which, layout, metrics) for layout in LAYOUTS for metrics in WANTED for which in KERNELS
                if not offline.spill_free(compiled(which, target, base, task, layout, metrics))]
    assert spilling == []


@pytest.mark.parametrize("base, size", [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_bytes_are_those_of_the_docstring(base, size):
    said = re.search(r"(\d+) per pair of bf16 weights, (\d+) of fp32", head_delta_stats_kernel.fn.__doc__)
    for name in WAYS:
        for metrics in WANTED:
            loaded = way(name, metrics, dtype=base).count("LDG.E.128") * 16 * LANES
            assert loaded / FLAT_TILE == 2 * size == int(said[1 if size == 2 else 2])
    assert offline.count(compiled("stats", base=base, layout="transposed"), "LDG.E.128") == 0


# At 3.0 TB/s a pair of bf16 weights arrives every 4/3 ps; 132 SMs of 4 issue slots at 1.75 GHz have 39 instructions
# for it, and twice as many for one of float32. The scan of listed tiles is the same for all metrics. Triton 3.9 adds
# two at a time on sm_100, 3.6 does not and takes 20.2 on sm_120 where 3.9 takes 19.5.
MOST = {"first pass": {"pad": (20, 27.5), "all": (33, 40)}, "scan": {"pad": (14.5, 16.5), "all": (14.5, 16.5)}}


@pytest.mark.parametrize("dtype, target", [
    *(("bf16", target) for target in offline.NVIDIA), ("fp16", "sm_90"), ("fp32", "sm_90"),
    *(pytest.param(dtype, target, marks=pytest.mark.slow) for dtype in ("fp16", "fp32") for target in offline.NVIDIA
      if target != "sm_90")])
@pytest.mark.parametrize("metrics", WANTED)
@pytest.mark.parametrize("name", WAYS)
def test_instructions_of_a_pair_of_weights(name, metrics, dtype, target):
    most = MOST[name][metrics][dtype == "fp32"] + 0.5 * (target == "sm_120")
    assert 10 < of_a_pair(name, metrics, target, dtype) <= most


def test_nothing_waits_for_another_warp():
    for name in WAYS:
        for metrics in WANTED:
            assert not [op for op in way(name, metrics) if op.startswith(("BAR", "STS", "LDS"))], (name, metrics)


def test_no_offset_is_a_32_bit_product():
    """Tiles of a matrix, of which no grid has more, may be counted in 32 bits: they divide a number of a tile."""
    for built in (compiled(which, layout=layout) for which in KERNELS for layout in LAYOUTS):
        assert all(offline.only_divides(product, built) for product in offline.unsafe_products(built))


def test_an_unsafe_product_is_seen():
    launch = Launch(_strided_copy_kernel, (1,), (torch.zeros(4096), 3), {"enable_fp_fusion": False})
    built = launch.compile("sm_90")
    (product,) = offline.unsafe_products(built)
    assert not offline.only_divides(product, built)


@triton.jit
def _strided_copy_kernel(x_ptr, stride):
    offs = tl.arange(0, 64)
    tl.store(x_ptr + offs, tl.load(x_ptr + (offs + tl.program_id(0)) * stride))


def segment(n, rows, cols, index, **options):
    return Segment(torch.zeros(n, rows, cols, **options), torch.zeros(n, rows, cols, **options), tuple(index))


class OnDevice(TorchDispatchMode):
    """Note what torch does on the device "meta", which stands for a GPU; what is copied from it comes as zeros."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        back = name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and args[0].is_meta
        out = torch.zeros(args[0].shape, dtype=args[0].dtype) if back else function(*args, **kwargs)
        there = [x for x in (*args, *kwargs.values(), out) if isinstance(x, torch.Tensor) and x.is_meta]
        if there and not function.is_view and not name.startswith("empty"):
            self.seen.append("back" if back else name)
        return out


@pytest.mark.parametrize("function, names", [(head_delta, [*KERNELS.values()]), (head_delta_projection, [*PRODUCTS])])
@pytest.mark.parametrize("metrics", WANTED.values(), ids=WANTED)
def test_a_call_launches_each_kernel_once_and_waits_once(metrics, function, names, monkeypatch):
    """1,024 heads of 32 layers, keys and values of 8 groups each."""
    sound = lambda sums, metrics: torch.zeros(len(sums.sizes), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(delta_tables.Sums, "doubtful", sound)
    group = [h // 4 for h in range(32)]
    layers = [(segment(32, 16, 128, range(32), device="meta"),
               *(segment(8, 16, 128, group, device="meta") for _ in range(2))) for _ in range(32)]
    with recorded() as launches, OnDevice() as device:
        found = function(layers, metrics, backend="triton")
    assert all(len(values) == 1024 for values in found.values())
    assert [launch.name for launch in launches] == names
    assert device.seen.count("back") == 1 and device.seen[-1] == "back"
    assert len(device.seen) + len(launches) <= 10, device.seen


def test_every_kind_of_matrices_is_one_launch_of_each_pass(metrics=("pad",)):
    layers = [(segment(2, 16, 128, (0, 1)), segment(1, 16, 130, (0, 0)), segment(2, 16, 130, (0, 1)),
               segment(2, 16, 128, (0, 1), dtype=torch.bfloat16))] * 3
    with recorded() as launches:
        head_delta(layers, metrics, backend="triton")
    assert Counter(launch.name for launch in launches) == dict(zip(KERNELS.values(), (3, 1, 3), strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_tables_describe_what_heads_read_once(seed, monkeypatch):
    """Every matrix that a head reads is in the tables once; each head leads to its own, in order; rows of stats are
    disjoint and complete; pass B has room for a whole head, and no tile of it is another kind's."""
    monkeypatch.setattr(delta_tables, "FLAT_TILE", 64)
    monkeypatch.setattr(delta_tables, "TILE", 32)
    rng = random.Random(seed)
    layers = []
    for _ in range(rng.randint(1, 3)):
        heads = rng.randint(1, 4)
        layers.append([segment(m := rng.randint(1, heads), rng.choice((1, 3, 16)), rng.choice((1, 16, 21, 64, 100)),
                               [rng.randrange(m) for _ in range(heads)], dtype=rng.choice((torch.float32, torch.bfloat16)))
                       for _ in range(rng.randint(1, 3))])
    with recorded() as launches:
        head_delta(layers, ["pad"], backend="triton")
    stats, (listing,), scans = ([launch for launch in launches if launch.name == name] for name in KERNELS.values())
    assert len(stats) == len(scans) == len({(s.base.shape[1:], s.base.dtype) for layer in layers for s in layer})
    wanted = [[tuple(side.data_ptr() + s.index[h] * side.stride(0) * side.element_size() for side in (s.base, s.task))
               for s in layer] for layer in layers for h in range(len(layer[0].index))]
    tables = [[*zip(*(launch.argument(name).tolist() for name in ("bases_ptr", "tasks_ptr")), strict=True)] for launch in stats]
    # Tables are filled up to whole 16 bytes: what is behind their last row means nothing.
    kinds = listing.argument("kinds_ptr")[:5 * len(stats)].view(-1, 5).tolist()
    whole, row = listing.argument("stats_ptr"), 0
    for launch, scan, table, (first, tiles, of_run, run, tile) in zip(stats, scans, tables, kinds, strict=True):
        del table[(scan.argument("end_row") - first) // tiles:]
        assert sorted(table) == sorted({matrix for reads in wanted for matrix in reads} & {*table}) and table
        rows, cols, runs = (launch.argument(name) for name in ("rows", "cols", "RUNS"))
        assert (run, tile) == (cols, launch.argument("TILE")) and of_run == -(-cols // tile) and tiles == rows * of_run
        assert launch.grid == (len(table) * of_run * -(-rows // runs),)
        at = (launch.argument("stats_ptr").data_ptr() - whole.data_ptr()) // (4 * STATS)
        assert at == first == scan.argument("first_row") == row
        row += len(table) * tiles
        assert scan.argument("end_row") == row
    assert whole.shape == (row, STATS)
    places, kinds_of, first = (listing.argument(name).tolist() for name in ("places_ptr", "kinds_of_ptr", "first_ptr"))
    reads = [[*range(*first[h:h + 2])] for h in range(len(wanted))]
    assert [[tables[kinds_of[i]][places[i]] for i in mine] for mine in reads] == wanted
    assert {matrix for table in tables for matrix in table} == {matrix for mine in wanted for matrix in mine}
    most = max(sum(kinds[kinds_of[i]][1] for i in mine) for mine in reads)
    assert listing.grid == (len(wanted),) and listing.argument("slots") == most
    for launch in (listing, *scans):
        assert launch.argument("list_ptr").shape == launch.argument("carries_ptr").shape == (len(wanted), most)
