"""Code generation of the scoring kernels: every target, no spills, 16-byte loads where it matters."""

import itertools
import random
import re
from collections import defaultdict

import pytest
import torch
import triton
import triton.language as tl

from alps_kernels.ops import METRICS, Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import tables as delta_tables
from alps_kernels.ops.delta.tables import BLOCK, K_BLOCK, LANES, ROWS
from csrc_triton.head_delta import head_delta_scan_kernel, head_delta_stats_kernel
from csrc_triton.head_projection import projection_scan_kernel, projection_stats_kernel
from tests.compiled import offline

TABLES = {"tiles_ptr": "*i64", "segments_ptr": "*i64", "inv_tau": "fp32"}
STATS = {**TABLES, "stats_ptr": "*fp32"}
SCAN = {**TABLES, "starts_ptr": "*fp32", "scans_ptr": "*fp32"}
PROJECTION = {"heads_ptr": "*i64", "mb_ptr": "*fp32", "mt_ptr": "*fp32", "md_ptr": "*fp32", "d_model": "i32",
              "stride_qb": "i32", "stride_qt": "i32", "inv_tau": "fp32"}
TILES = ((True, True), (True, False), (False, False))  # FLAT and FULL
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def lanes(target):
    return 64 if target.startswith("gfx") else LANES


def stats(base="bf16", flat=True, norms=True, target="sm_90", full=True, task=None):
    return offline.build(head_delta_stats_kernel, STATS, {
        "BASE": DTYPES[base], "TASK": DTYPES[task or base], "FLAT": flat, "FULL": full, "NORMS": norms, "BLOCK": BLOCK,
        "LANES": lanes(target)}, target=target, num_warps=1, fusion=True)


def scan(base="bf16", flat=True, extra=True, target="sm_90", full=True, task=None):
    return offline.build(head_delta_scan_kernel, SCAN, {
        "BASE": DTYPES[base], "TASK": DTYPES[task or base], "FLAT": flat, "FULL": full, "EXTRA": extra, "BLOCK": BLOCK,
        "LANES": lanes(target)}, target=target, num_warps=1, fusion=True)


def shape(base, d_k, d_v, target):
    return {"BASE": DTYPES[base], "TASK": DTYPES[base], "D_K": d_k, "D_V": d_v, "V_PAD": d_v, "ROWS": ROWS,
            "K_BLOCK": K_BLOCK, "PRECISION": "ieee" if target.startswith("gfx") else "tf32x3"}


def project(which="stats", base="bf16", d=128, target="sm_90"):
    aligned = tuple(n for n in PROJECTION if n != "inv_tau")
    if which == "stats":
        return offline.build(projection_stats_kernel, {**PROJECTION, "stats_ptr": "*fp32"},
                             shape(base, d, d, target) | {"NORMS": True}, target=target, aligned=aligned)
    return offline.build(projection_scan_kernel, {**PROJECTION, "starts_ptr": "*fp32", "scans_ptr": "*fp32"},
                         shape(base, d, d, target) | {"EXTRA": True}, target=target, aligned=aligned)


PASSES = {"stats": stats, "stats of pad": lambda **options: stats(norms=False, **options),
          "scan": scan, "scan of pad": lambda **options: scan(extra=False, **options)}


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("name", PASSES)
def test_passes_compile_without_spills(name, target):
    assert offline.spill_free(PASSES[name](target=target))


@pytest.mark.parametrize("base, target", [*((base, "sm_90") for base in DTYPES), ("bf16", "gfx942")])
@pytest.mark.parametrize("kernel", [stats, scan])
def test_other_strides_dtypes_and_tails_compile(kernel, base, target):
    for flat in (True, False):
        assert offline.spill_free(kernel(base=base, flat=flat, full=False, target=target))


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("which", ["stats", "scan"])
def test_projection_compiles_without_spills(which, target):
    assert offline.spill_free(project(which, target=target))


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("task", DTYPES)
def test_every_variant_compiles_for_every_target_without_spills(task, base, target):
    spilling = []
    for (flat, full), more in itertools.product(TILES, (True, False)):
        spilling += [("stats", flat, full, more)] * (not offline.spill_free(stats(base, flat, more, target, full, task)))
        spilling += [("scan", flat, full, more)] * (not offline.spill_free(scan(base, flat, more, target, full, task)))
    # One of 648: 16 bytes of stack where float32 weights that do not lie flat are scanned for all metrics.
    assert spilling == ([("scan", False, False, True)] if (base, task, target) == ("fp32", "fp32", "sm_100") else [])


@pytest.mark.parametrize("kernel", [head_delta_stats_kernel, head_delta_scan_kernel])
@pytest.mark.parametrize("base, size", [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_bytes_are_those_of_the_docstring(kernel, base, size):
    build = stats if kernel is head_delta_stats_kernel else scan
    loaded = offline.fast_path(build(base=base)).count("LDG.E.128") * 16 * LANES
    said = re.search(r"(\d+) per pair of bf16 weights, (\d+) of fp32", kernel.fn.__doc__)
    assert loaded / BLOCK == 2 * size == int(said[1 if size == 2 else 2])
    assert offline.count(build(base=base, flat=False, full=False), "LDG.E.128") == 0


# At 3.0 TB/s a pair of bf16 weights arrives every 4/3 ps; 132 SMs of 4 issue slots at 1.75 GHz have 39 instructions
# for it. Counted on sm_90: 15.3, 12.9, 23.9, 13.5; fewer on sm_100, which adds two at a time.
@pytest.mark.parametrize("target", offline.NVIDIA)
@pytest.mark.parametrize("name, most", [("stats", 15.5), ("stats of pad", 13), ("scan", 24.1), ("scan of pad", 13.7)])
def test_instructions_of_a_pair_of_weights(name, most, target):
    assert 10 < len(offline.fast_path(PASSES[name](target=target))) / (BLOCK / LANES) <= most


@pytest.mark.parametrize("name, most", [("stats", 72), ("stats of pad", 64), ("scan", 80), ("scan of pad", 72)])
def test_registers_leave_room_for_many_programs(name, most):
    assert offline.resources(PASSES[name]()).registers <= most  # 65,536 an SM, 32 threads a program, 32 programs at the most


def test_nothing_waits_for_another_warp():
    for name, passes in PASSES.items():
        assert not [op for op in offline.fast_path(passes()) if op.startswith(("BAR", "STS", "LDS"))], name


def test_no_offset_is_a_32_bit_product():
    for built in (stats(), stats(flat=False, full=False), scan(), scan(flat=False, full=False), project("stats"), project("scan")):
        assert offline.unsafe_products(built) == []


def test_an_unsafe_product_is_seen():
    assert len(offline.unsafe_products(offline.build(_strided_copy_kernel, {"x_ptr": "*fp32", "stride": "i32"}, {}))) == 1


@triton.jit
def _strided_copy_kernel(x_ptr, stride):
    offs = tl.arange(0, 64)
    tl.store(x_ptr + offs, tl.load(x_ptr + (offs + tl.program_id(0)) * stride))


def test_products_run_on_tensor_cores():
    for which in ("stats", "scan"):
        assert any(op in offline.sass(project(which)) for op in ("HMMA", "HGMMA", "IMMA"))
        assert offline.resources(project(which)).registers <= 255


class Counter:
    """Stands for a module of kernels: every launch is noted, none is made."""

    def __init__(self):
        self.launches = []

    def __getattr__(self, name):
        return defaultdict(lambda: lambda *_, **__: self.launches.append(name))


def segment(n, rows, cols, index):
    return Segment(torch.zeros(n, rows, cols), torch.zeros(n, rows, cols), tuple(index))


@pytest.mark.parametrize("metrics", [["pad"], [name for name in METRICS if name != "pad_values"]])
def test_all_layers_go_in_a_handful_of_launches(metrics, monkeypatch):
    counter = Counter()
    monkeypatch.setattr(delta_tables, "device_code", lambda _: counter)
    group = [h // 2 for h in range(8)]
    layers = [(segment(8, 16, 192, range(8)), segment(4, 16, 192, group), segment(4, 16, 192, group))] * 32
    head_delta(layers, metrics, backend="triton")
    assert launched(counter) == {"head_delta_stats_kernel": 2, "head_delta_scan_kernel": 2}  # full tiles, last tiles
    counter.launches.clear()
    head_delta_projection(layers, metrics, backend="triton")
    assert launched(counter) == {"projection_stats_kernel": 1, "projection_scan_kernel": 1}


def launched(counter):
    return {name: counter.launches.count(name) for name in counter.launches}


@pytest.mark.parametrize("seed", range(8))
def test_the_work_list_covers_every_head_once(seed, monkeypatch):
    monkeypatch.setattr(delta_tables, "BLOCK", 64)
    rng = random.Random(seed)
    layers, sizes = [], []
    for _ in range(rng.randint(1, 3)):
        heads = rng.randint(1, 4)
        layers.append([segment(m := rng.randint(1, heads), rng.choice((1, 3, 16)), rng.choice((1, 16, 21, 64)),
                               [rng.randrange(m) for _ in range(heads)]) for _ in range(rng.randint(1, 3))])
        sizes += [sum(s.base[0].numel() for s in layers[-1])] * heads
    slots = max(sum(-(-s.base[0].numel() // 64) for s in layer) for layer in layers)
    tiles, segments, found = delta_tables._work_list(layers, slots)
    assert found == sizes
    covered, slots_used = defaultdict(list), set()
    for key, table in tiles.items():
        for *at, slot, count, last in table.tolist():
            base, task = at if key.flat else (address + 4 * at[1] for address in segments[at[0]].tolist()[:2])
            assert 0 < count <= 64 and slot not in slots_used and key.full == (key.flat and count == 64)
            assert not key.flat or base % 16 == task % 16 == count % 16 == 0
            slots_used.add(slot)
            covered[slot // slots].append((slot, [(base + 4 * i, task + 4 * i) for i in range(count)], last))
    expected = [[(s.base[s.index[h]].data_ptr() + 4 * i, s.task[s.index[h]].data_ptr() + 4 * i)
                 for s in layer for i in range(s.base[0].numel())] for layer in layers for h in range(len(layer[0].index))]
    for head, pairs in enumerate(expected):
        in_order = sorted(covered.pop(head))
        assert [pair for _, part, _ in in_order for pair in part] == pairs
        assert [last for *_, last in in_order] == [0] * (len(in_order) - 1) + [1]
    assert not covered
