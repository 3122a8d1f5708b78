"""The offline-compile harness: it reaches machine code, and it sees what it is asked to see."""

import ast
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

import csrc_triton
from tests.compiled import offline


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)


SIGNATURE = {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32"}


@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_target_reaches_machine_code(target):
    built = offline.build(_copy_kernel, SIGNATURE, {"BLOCK": 1024}, target=target)
    assert built.asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert offline.spill_free(built)


def test_a_missing_hint_costs_the_16_byte_loads():
    hinted = offline.build(_copy_kernel, SIGNATURE, {"BLOCK": 1024}, aligned=("x_ptr", "out_ptr", "n"))
    plain = offline.build(_copy_kernel, SIGNATURE, {"BLOCK": 1024}, aligned=("x_ptr", "out_ptr"))
    assert offline.count(hinted, "LDG.E.128") > 0 and offline.count(hinted, "STG.E.128") > 0
    assert offline.count(plain, "LDG.E.128") == 0
    assert offline.resources(hinted).registers > 0


def test_a_forgotten_argument_is_named():
    with pytest.raises(TypeError, match="n"):
        offline.build(_copy_kernel, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"BLOCK": 1024})


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
    built = [offline.build(_loop_kernel, {"x_ptr": "*fp32", "n": "i32"}, {"ALWAYS": always}, target=target)
             for always in (False, True) for target in offline.NVIDIA]
    for without in built[:5]:
        assert [op.split(".")[0] for op in offline.fast_path(without)].count("LDG") == 1
    for always in built[5:]:
        with pytest.raises(ValueError, match="loop"):
            offline.fast_path(always)
