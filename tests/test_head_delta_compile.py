"""Code generation of the scoring kernels: every target, no spills, 16-byte loads where it matters."""

import pytest
import triton.language as tl

from alps_kernels.ops.delta_tables import BLOCK, K_BLOCK, ROWS
from csrc_triton.head_delta import (
    head_delta_scan_kernel,
    head_delta_stats_kernel,
    projection_scan_kernel,
    projection_stats_kernel,
)
from tests import offline

TABLES = {"tiles_ptr": "*i64", "segments_ptr": "*i64", "inv_tau": "fp32"}
STATS = {**TABLES, "stats_ptr": "*fp32"}
SCAN = {**TABLES, "heads_ptr": "*fp32", "carry_ptr": "*fp32", "scans_ptr": "*fp32"}
PROJECTION = {"heads_ptr": "*i64", "mb_ptr": "*fp32", "mt_ptr": "*fp32", "md_ptr": "*fp32", "d_model": "i32",
              "stride_qb": "i32", "stride_qt": "i32", "inv_tau": "fp32"}
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def stats(base="bf16", flat=True, target="sm_90"):
    return offline.build(head_delta_stats_kernel, STATS, {
        "BASE": DTYPES[base], "TASK": DTYPES[base], "FLAT": flat, "BLOCK": BLOCK}, target=target)


def scan(base="bf16", flat=True, extra=True, target="sm_90"):
    return offline.build(head_delta_scan_kernel, SCAN, {
        "BASE": DTYPES[base], "TASK": DTYPES[base], "FLAT": flat, "EXTRA": extra, "BLOCK": BLOCK, "SLOTS": 768}, target=target)


def shape(base, d_k, d_v, target):
    return {"BASE": DTYPES[base], "TASK": DTYPES[base], "D_K": d_k, "D_V": d_v, "V_PAD": d_v, "ROWS": ROWS,
            "K_BLOCK": K_BLOCK, "SLOTS": 256, "PRECISION": "ieee" if target.startswith("gfx") else "tf32x3"}


def project(which="stats", base="bf16", d=128, target="sm_90"):
    if which == "stats":
        return offline.build(projection_stats_kernel, {**PROJECTION, "stats_ptr": "*fp32"}, shape(base, d, d, target),
                             target=target, aligned=tuple(n for n in PROJECTION if n != "inv_tau"))
    signature = {**PROJECTION, "table_ptr": "*fp32", "carry_ptr": "*fp32", "scans_ptr": "*fp32"}
    return offline.build(projection_scan_kernel, signature, shape(base, d, d, target) | {"EXTRA": True},
                         target=target, aligned=tuple(n for n in PROJECTION if n != "inv_tau"))


@pytest.mark.parametrize("target", offline.TARGETS)
@pytest.mark.parametrize("kernel", [stats, scan])
def test_passes_compile_without_spills(kernel, target):
    assert offline.spill_free(kernel(target=target))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("which", ["stats", "scan"])
def test_projection_compiles_without_spills(which, target):
    assert offline.spill_free(project(which, target=target))


@pytest.mark.parametrize("kernel", [stats, scan])
@pytest.mark.parametrize("base, elements", [("bf16", 8), ("fp32", 4)])
def test_contiguous_heads_are_read_16_bytes_at_a_time(kernel, base, elements):
    per_thread = BLOCK // 128 // elements
    assert offline.count(kernel(base=base), "LDG.E.128") == 2 * per_thread  # of each model
    assert offline.count(kernel(base=base, flat=False), "LDG.E.128") == 0


@pytest.mark.parametrize("kernel", [stats, scan])
def test_other_strides_and_dtypes_compile(kernel):
    for base in DTYPES:
        assert offline.spill_free(kernel(base=base, flat=False))


def test_registers_leave_room_for_two_blocks_of_warps():
    # 64 warps of an SM share 65,536 registers: at 128 a thread, 4 blocks of 4 warps are resident.
    assert offline.resources(stats()).registers <= 96
    assert offline.resources(scan()).registers <= 128


def test_products_run_on_tensor_cores():
    assert any(op in offline.sass(project()) for op in ("HMMA", "HGMMA", "IMMA"))
