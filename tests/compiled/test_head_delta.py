"""Code generation of the scoring kernels: every target, no spills, 16-byte loads where it matters."""

import random
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from alps_kernels.ops import Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import tables as delta_tables
from alps_kernels.ops.delta.tables import BLOCK, LANES
from csrc_triton.head_delta import head_delta_scan_kernel, head_delta_stats_kernel

from ..support.launches import Launch, recorded
from . import offline
from .cases import LAYOUTS, WANTED, projection_launches, score_launches

DTYPES = ("bf16", "fp16", "fp32")
KERNELS = {"stats": "head_delta_stats_kernel", "scan": "head_delta_scan_kernel"}
PRODUCTS = {"stats": "projection_stats_kernel", "scan": "projection_scan_kernel"}
PASSES = {"stats": ("stats", "all"), "stats of pad": ("stats", "pad"),
          "scan": ("scan", "all"), "scan of pad": ("scan", "pad")}


def compiled(which, target="sm_90", *case, **options):
    return score_launches(target, *case, **options)[KERNELS[which]].compile(target)


def compiled_pass(name, target="sm_90"):
    which, metrics = PASSES[name]
    return compiled(which, target, metrics=metrics)


def project(which, target="sm_90", *case, **options):
    return projection_launches(target, *case, **options)[PRODUCTS[which]].compile(target)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("metrics", WANTED)
def test_a_launch_is_that_of_its_case(layout, metrics):
    for target, lanes in (("sm_90", 32), ("gfx942", 64)):
        stats, scan = (score_launches(target, "fp32", "bf16", layout, metrics)[name] for name in KERNELS.values())
        for launch in (stats, scan):
            found = {key: launch.argument(key) for key in ("BASE", "TASK", "LANES", "FLAT", "FULL")}
            assert {key: str(value) for key, value in found.items()} == {
                "BASE": "fp32", "TASK": "bf16", "LANES": str(lanes), "FLAT": str(layout != "strided"),
                "FULL": str(layout == "full")}
        assert stats.argument("NORMS") == scan.argument("EXTRA") == (metrics == "all")


# What a B200 would need more of: bytes on the way at once, as a share of what its bandwidth asks for. On all other
# targets the passes have enough; the weights' dtype does not matter to it.
SHORT = {("scan", "sm_100"): 0.4}


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("name", PASSES)
def test_passes_have_the_resources_that_they_need(name, target):
    """No spills, and enough programs of one warp each for the memory's bandwidth, whatever registers a compiler takes.

    Triton 3.6 takes 80 in "stats of pad" on sm_90 where 3.9 takes 64: 24 programs an SM, whose loads are still
    four times what the bandwidth asks for.
    """
    built = compiled_pass(name, target)
    assert offline.spill_free(built)
    if target in offline.NVIDIA:
        assert built.metadata.shared == 0
        asked, needed = offline.in_flight(built), offline.needed(built)
        found = offline.resources(built), offline.resident(built), asked, needed
        assert asked >= needed * SHORT.get((name, target), 1), found
    else:  # 8 waves of a compute unit: two for each of its SIMDs, so that one computes while the other waits
        assert offline.resident(built) * built.metadata.num_warps >= 8


@pytest.mark.parametrize("base, target", [*((base, "sm_90") for base in DTYPES), ("bf16", "gfx942")])
@pytest.mark.parametrize("which", KERNELS)
def test_other_strides_dtypes_and_tails_compile(which, base, target):
    for layout in ("tail", "strided"):
        built = compiled(which, target, base, layout=layout)
        assert offline.spill_free(built) and offline.resident(built) * built.metadata.num_warps >= 8


def check_product(built):
    """No spills, a program fits, and each of the four schedulers of an SM has a warp of it: the products bound it."""
    what = offline.resources(built), offline.resident(built)
    assert offline.spill_free(built), what
    assert offline.resident(built) * built.metadata.num_warps >= 4, what


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("which", PRODUCTS)
def test_projection_has_the_resources_that_it_needs(which, target):
    check_product(project(which, target))


@pytest.mark.parametrize("target", ["sm_80", "sm_120", "gfx942"])
def test_projection_of_wide_heads_fits_the_smallest_shared_memory(target):
    """Heads of 256 (Gemma), float32 weights."""
    check_product(project("scan", target, "fp32", 256, 256))


def test_the_stages_that_triton_takes_by_itself_are_seen():
    launch = projection_launches("sm_120", "fp32")["projection_scan_kernel"]
    check_product(launch.compile("sm_120"))
    options = {name: value for name, value in launch.options.items() if name != "num_stages"}
    of_triton = replace(launch, options=options).compile("sm_120")
    assert of_triton.metadata.num_stages == 3
    with pytest.raises(AssertionError):
        check_product(of_triton)


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("task", DTYPES)
def test_every_variant_compiles_for_every_target_without_spills(task, base, target):
    spilling = [(which, layout, metrics) for layout in LAYOUTS for metrics in WANTED for which in KERNELS
                if not offline.spill_free(compiled(which, target, base, task, layout, metrics))]
    # One of 756, with Triton 3.9 and not with 3.6: 16 bytes of stack where float32 weights that do not lie flat are
    # scanned for all metrics.
    known = [("scan", "strided", "all")] if (base, task, target) == ("fp32", "fp32", "sm_100") else []
    assert [case for case in spilling if case not in known] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("d_k, d_v", [(64, 64), (80, 80), (192, 128), (256, 256)])
def test_every_projection_has_the_resources_that_it_needs(d_k, d_v, base, target):
    for metrics in WANTED:
        for which in PRODUCTS:
            check_product(project(which, target, base, d_k, d_v, metrics))


@pytest.mark.parametrize("which, kernel", [("stats", head_delta_stats_kernel), ("scan", head_delta_scan_kernel)])
@pytest.mark.parametrize("base, size", [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_bytes_are_those_of_the_docstring(which, kernel, base, size):
    loaded = offline.fast_path(compiled(which, base=base)).count("LDG.E.128") * 16 * LANES
    said = re.search(r"(\d+) per pair of bf16 weights, (\d+) of fp32", kernel.fn.__doc__)
    assert loaded / BLOCK == 2 * size == int(said[1 if size == 2 else 2])
    assert offline.count(compiled(which, base=base, layout="strided"), "LDG.E.128") == 0


# At 3.0 TB/s a pair of bf16 weights arrives every 4/3 ps; 132 SMs of 4 issue slots at 1.75 GHz have 39 instructions
# for it. Counted on sm_90: 15.3, 12.9, 23.9, 13.5; fewer on sm_100, which adds two at a time.
@pytest.mark.parametrize("target", offline.NVIDIA)
@pytest.mark.parametrize("name, most", [("stats", 15.5), ("stats of pad", 13), ("scan", 24.1), ("scan of pad", 13.7)])
def test_instructions_of_a_pair_of_weights(name, most, target):
    assert 10 < len(offline.fast_path(compiled_pass(name, target))) / (BLOCK / LANES) <= most


def test_nothing_waits_for_another_warp():
    for name in PASSES:
        assert not [op for op in offline.fast_path(compiled_pass(name)) if op.startswith(("BAR", "STS", "LDS"))], name


def test_no_offset_is_a_32_bit_product():
    for which in KERNELS:
        for built in (compiled(which), compiled(which, layout="strided"), project(which)):
            assert offline.unsafe_products(built) == []


def test_an_unsafe_product_is_seen():
    launch = Launch(_strided_copy_kernel, (1,), (torch.zeros(4096), 3), {"enable_fp_fusion": False})
    assert len(offline.unsafe_products(launch.compile("sm_90"))) == 1


@triton.jit
def _strided_copy_kernel(x_ptr, stride):
    offs = tl.arange(0, 64)
    tl.store(x_ptr + offs, tl.load(x_ptr + (offs + tl.program_id(0)) * stride))


def test_products_run_on_tensor_cores():
    for which in PRODUCTS:
        assert any(op in offline.sass(project(which)) for op in ("HMMA", "HGMMA", "IMMA"))


def segment(n, rows, cols, index):
    return Segment(torch.zeros(n, rows, cols), torch.zeros(n, rows, cols), tuple(index))


@pytest.mark.parametrize("metrics", WANTED.values(), ids=WANTED)
def test_all_layers_go_in_a_handful_of_launches(metrics):
    group = [h // 2 for h in range(8)]
    layers = [(segment(8, 16, 192, range(8)), segment(4, 16, 192, group), segment(4, 16, 192, group))] * 32
    with recorded() as launches:
        head_delta(layers, metrics, backend="triton")
    # full tiles, last tiles
    assert Counter(launch.name for launch in launches) == {"head_delta_stats_kernel": 2, "head_delta_scan_kernel": 2}
    with recorded() as launches:
        head_delta_projection(layers, metrics, backend="triton")
    assert Counter(launch.name for launch in launches) == {"projection_stats_kernel": 1, "projection_scan_kernel": 1}


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
