"""The offline-compile harness: it reaches machine code, and it sees what it is asked to see."""

import ast
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

import csrc_triton

from ..support.launches import Launch
from . import offline


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


def copy_of(n):
    x = torch.zeros(n, dtype=torch.bfloat16)
    return Launch(_copy_kernel, (1,), (x, torch.zeros_like(x), n), {"BLOCK": 1024})


@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_target_reaches_machine_code(target):
    built = copy_of(1024).compile(target)
    assert built.asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert offline.spill_free(built) and offline.resources(built).registers > 0
    assert 1 < offline.resident(built) <= offline.MULTIPROCESSORS[target].programs


def test_a_length_that_is_no_multiple_of_16_costs_the_16_byte_loads():
    wide, narrow = copy_of(1024).compile("sm_90"), copy_of(1023).compile("sm_90")
    assert offline.count(wide, "LDG.E.128") > 0 and offline.count(wide, "STG.E.128") > 0
    assert offline.count(narrow, "LDG.E.128") == 0
    # one access of 16 bytes, or eight of 2, of each of 128 threads
    assert [offline.in_flight(built) // offline.resident(built) for built in (wide, narrow)] == [2048, 2048]


def test_programs_that_fit_are_counted():
    """By warps, registers, programs and shared memory, whichever runs out first."""
    def held(registers, warps, shared, arch=90, backend="cuda", warp_size=32):
        metadata = SimpleNamespace(num_warps=warps, shared=shared, target=GPUTarget(backend, arch, warp_size))
        with mock.patch.object(offline, "resources", lambda _: offline.Resources(registers, 0, 0, shared)):
            return offline.resident(SimpleNamespace(metadata=metadata))

    assert held(32, 8, 0) == 8 and held(32, 8, 0, 86) == 6
    assert held(65, 4, 0) == 7 and held(72, 4, 0) == 7 and held(73, 4, 0) == 6
    assert held(16, 1, 0) == 32 and held(16, 1, 0, 86) == 16
    assert held(32, 4, 100 * 1024) == 2 and held(32, 4, 99 * 1024, 86) == 1 and held(32, 4, 99 * 1024 + 1, 86) == 0
    assert held(128, 4, 0, "gfx942", "hip", 64) == 4


@pytest.mark.parametrize("path", sorted(Path(csrc_triton.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_constant_is_a_normal_float32(path):
    """Triton 3.6 takes any other as float64, and all that it meets with it: codes of 8 bits were cut off, not rounded."""
    floats = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
              and isinstance(node.value, float)]
    info = torch.finfo(torch.float32)
    assert [x for x in floats if x != 0 and not info.smallest_normal <= x <= info.max] == []


@triton.jit
def _loop_kernel(x_ptr, n, ALWAYS: tl.constexpr):
    total = tl.load(x_ptr)
    if ALWAYS or n == 7:
        for i in tl.range(0, 1000):
            total += tl.load(x_ptr + i) * total
    tl.store(x_ptr, total)


def test_the_fast_path_goes_round_loops():
    for target in offline.NVIDIA:
        without, always = (Launch(_loop_kernel, (1,), (torch.zeros(4096), 5), {
            "ALWAYS": always, "enable_fp_fusion": False}).compile(target) for always in (False, True))
        assert [op.split(".")[0] for op in offline.fast_path(without)].count("LDG") == 1
        with pytest.raises(ValueError, match="loop"):
            offline.fast_path(always)


@triton.jit
def _rare_kernel(x_ptr, out_ptr, AGAIN: tl.constexpr):
    offs = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    total = tl.sum(tl.load(x_ptr + offs), axis=0)
    tl.store(out_ptr, total)
    if AGAIN and total > 1.0:
        tl.store(out_ptr + 1, tl.sum(tl.exp(tl.load(x_ptr + offs)), axis=0))


def test_the_fast_path_leaves_out_what_only_some_warps_read_again():
    for target in offline.NVIDIA:
        plain, again = (Launch(_rare_kernel, (4,), (torch.zeros(4096), torch.zeros(16)), {
            "AGAIN": again, "num_warps": 1, "enable_fp_fusion": False}).compile(target) for again in (False, True))
        plain, again = map(offline.fast_path, (plain, again))
        assert plain.count("LDG.E.128") == again.count("LDG.E.128") == 8
        assert len(plain) - 8 <= len(again) <= len(plain) + 16 and any(op.startswith("ST") for op in again)


@triton.jit
def _product_kernel(x_ptr, step_ptr, out_ptr, UNROLLED: tl.constexpr):
    rows = tl.arange(0, 32)
    x_ptr += rows[:, None] * 4096 + tl.arange(0, 16)[None, :]
    total, step, k = tl.zeros((32, 32), tl.float32), tl.load(step_ptr), 0
    if UNROLLED:
        for i in tl.static_range(2):
            x = tl.load(x_ptr + 16 * i)
            total = tl.dot(x, tl.trans(x), total)
    else:
        while k < 4096:
            x = tl.load(x_ptr + k)
            total = tl.dot(x, tl.trans(x), total)
            k += step
    if tl.max(tl.abs(total)) > 1.0:
        total = tl.exp(tl.exp(total))
        total += tl.sum(total, axis=0)[None, :]
    tl.store(out_ptr + rows[:, None] * 32 + rows[None, :], total)


def test_the_fast_path_goes_through_a_loop_as_often_as_its_products_need():
    """Each of 4 warps has two products a round; eight in all where Triton sees two dots in a row."""
    for target in ("sm_80", "sm_90", "sm_120"):
        args = torch.zeros(32, 4096, dtype=torch.float16), torch.zeros(1, dtype=torch.int32), torch.zeros(32, 32)
        built, unrolled = (Launch(_product_kernel, (1,), args, {"UNROLLED": unrolled, "enable_fp_fusion": False}
                                  ).compile(target) for unrolled in (False, True))
        ways = [offline.fast_path(built, "HMMA", times) for times in (2, 4, 10)]
        assert [sum(op.startswith("HMMA") for op in way) for way in ways] == [2, 4, 10]
        loads = [sum(op.startswith("LDG.") for op in way) for way in ways]
        assert loads[2] - loads[1] == 3 * (loads[1] - loads[0]) > 0
        assert len(ways[2]) - len(ways[1]) == 3 * (len(ways[1]) - len(ways[0])) > 3 * 8
        assert not any("EX2" in op for op in ways[2]) and offline.count(built, "MUFU.EX2") > 0
        assert sum(op.startswith("HMMA") for op in offline.fast_path(unrolled, "HMMA", 8)) == 8
        for which, op, times, why in ((built, "HMMA", 3, "3 HMMA"), (built, "HMMA", 0, "0 HMMA"),
                                      (built, "IMMA", 2, "0 loops"), (unrolled, "HMMA", 16, "0 loops")):
            with pytest.raises(ValueError, match=why):
                offline.fast_path(which, op, times)


@pytest.mark.parametrize("last, count", [("BAR.SYNC", 5), ("NOP", 8)])
def test_the_fast_path_ends_where_all_threads_exit(last, count):
    """An EXIT under a predicate, behind which threads wait for each other: what is there is the other branch."""
    ops = ["BAR.SYNC", "HMMA", "@P0 BRA 0x10", "STG.E", "@P1 EXIT", last, "STG.E", "EXIT"]
    code = "\n".join(f"/*{16 * i:04x}*/ {op} ;" for i, op in enumerate(ops))
    with mock.patch.object(offline, "sass", lambda built: code):
        assert len(offline.fast_path(None, "HMMA", 3)) == count + 2 * 2  # two more rounds


@triton.jit
def _listed_kernel(x_ptr, list_ptr, out_ptr, n, INNER: tl.constexpr):
    i, total = tl.program_id(0), 0.0
    while i < n:
        place = tl.load(list_ptr + i)
        x = x_ptr + place // 2 * 1024
        if INNER or place % 2 == 1:
            for chunk in tl.range(0, n * 128, 128):  # a number that lets nothing be unrolled
                total += tl.sum(tl.exp(tl.load(x + chunk + tl.arange(0, 128))), axis=0)
        elif place > 0:
            total += tl.sum(tl.load(x + tl.arange(0, 1024)), axis=0)
        i += tl.num_programs(0)
    tl.store(out_ptr, total)


def test_the_loop_path_is_once_round_the_outer_loop():
    """Through the branch that loads everything at once: neither the one with a loop of its own, nor past both."""
    for target in offline.NVIDIA:
        args = torch.zeros(4096), torch.zeros(4, dtype=torch.int32), torch.zeros(16), 5
        built, inner = (Launch(_listed_kernel, (4,), args, {"INNER": inner, "num_warps": 1, "enable_fp_fusion": False}
                               ).compile(target) for inner in (False, True))
        way = offline.loop_path(built)
        assert way.count("LDG.E.128") == 8 and 40 < len(way) < 160
        with pytest.raises(ValueError, match="no loop inside"):
            offline.loop_path(inner)
        with pytest.raises(ValueError, match="0 places"):
            offline.loop_path(copy_of(1024).compile(target))
