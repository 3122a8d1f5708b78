"""The offline-compile harness: it reaches machine code, and it sees what it is asked to see."""

import pytest
import triton
import triton.language as tl

from tests import offline


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
