"""The kernels that score W_h = q_h^T k_g v_g^T as compiled code: scores, exact footprints, faults that must be seen."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("ptxemu", reason="the emulator of PTX is not on the path: make emulate")

from ptxemu.machine import EmulationError

from alps_kernels.ops import head_delta_projection
from alps_kernels.ops.delta import projection
from tests.emulated.scoring import ROUGH, SUMMED, close, footprint, pass_of, watched
from tests.ops.delta_cases import projection_layer
from tests.ops.delta_oracle import projection_oracle
from tests.support.mutants import plant_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT_ROW = 10  # columns of `stats` that `pad` needs
CASES = {  # d_k, d_v, d_model, dtypes, heads, groups, tau, whether sizes are those for Hopper
    "128 x 256, whole tiles": (128, 256, 32, (FP32,), 4, 1, 2.0, False),
    "80 x 64, Hopper's sizes": (80, 64, 33, (FP16, BF16), 2, 2, 0.5, True),
}
MORE_CASES = {
    "64 x 64": (64, 64, 33, (FP32,), 4, 1, 2.0, False),
    "128 x 128": (128, 128, 64, (BF16,), 4, 1, 0.5, False),
    "128 x 256": (128, 256, 40, (BF16,), 4, 1, 1.0, False),
    "128 x 128, Hopper's sizes": (128, 128, 64, (BF16,), 2, 1, 2.0, True),
    "64 x 64, Hopper's sizes": (64, 64, 96, (FP16,), 4, 1, 1.0, True),
    "96 x 80, Hopper's sizes": (96, 80, 33, (FP16, BF16), 2, 2, 0.5, True),
    "80 x 80": (80, 80, 33, (FP16,), 8, 1, 2.0, False),
    "64 x 80": (64, 80, 50, (BF16, FP32), 4, 4, 0.5, False),
    "96 x 96": (96, 96, 40, (FP32, BF16), 4, 1, 1.0, False),
    "64 x 128": (64, 128, 40, (FP32, FP16), 2, 2, 2.0, False),
    "256 x 256": (256, 256, 40, (FP32,), 1, 1, 0.5, False),
    "256 x 256, Hopper's sizes": (256, 256, 40, (BF16,), 2, 2, 2.0, True),
}


def surrounded(layer):
    """The same weights at odd addresses, NaN in front of them and in a matrix more that no head reads, the first.

    The storage ends where the last matrix does.
    """
    def moved(side):
        room = torch.full((3 + side.numel() + side[0].numel(),), torch.nan, dtype=side.dtype)
        matrices = room[3:].view(len(side) + 1, *side.shape[1:])
        matrices[1:] = side
        return matrices

    return tuple(replace(s, base=moved(s.base), task=moved(s.task), index=tuple(i + 1 for i in s.index)) for s in layer)


def little(heads=8):
    """A group of heads; d_k, d_v and d_model fill no block."""
    return surrounded(projection_layer(20, 24, 33, BF16, heads=heads))


def run(layer, metrics=SUMMED, tau=1.0, **config):
    with watched(**config) as session:
        found = head_delta_projection([layer], metrics, temperature=tau, backend="triton")
    assert len(session.launches) == 4
    close(found, projection_oracle([layer], tau), ROUGH if {"mma", "approximation"} & config.keys() else 2e-7)
    return found, session


def check_bytes(layer, session):
    """Each kernel reads the weights that it should, and asks for each byte as often as its blocks need it.

    Group products: k for each block of columns, v for each block of rows. Pass A: q once. Pass B: some of q again.
    """
    q, k, v = (footprint([[s]]) for s in layer)
    for launch, given in zip(session.launches, session.given, strict=True):
        times, rows = {}, launch.traffic.by_allocation()
        if pass_of(launch.kernel) == "products":
            times |= dict.fromkeys(k, given["V_PAD"] // given["COLS"])
            times |= dict.fromkeys(v, -(-given["K_PAD"] // given["ROWS"]))
        elif pass_of(launch.kernel) == "stats":
            times |= dict.fromkeys(q, 1)
        for base, mask in (q | k | v).items():
            read = launch.touched[base][0] if base in launch.touched else np.zeros_like(mask)
            assert not (read & ~mask).any(), f"{launch.kernel} reads weights that no head reads"
            if base in times:
                assert np.array_equal(read, mask), f"{launch.kernel} leaves weights out"
                asked, total = rows[launch.memory.at(base).name, "ld"]["bytes"], times[base] * int(mask.sum())
                assert asked == total, f"{launch.kernel} asks for {asked} bytes of {total}"
            elif pass_of(launch.kernel) != "scan" or base not in q:
                assert not read.any(), f"{launch.kernel} reads weights that it does not need"


def written(session, name):
    """Which elements the launch of this pass wrote of what it may write first."""
    launch, given = next((launch, given) for launch, given in zip(session.launches, session.given, strict=True)
                         if pass_of(launch.kernel) == name)
    out = given[f"{name}_ptr"]
    mask = launch.touched[out.untyped_storage().data_ptr()][1]
    return torch.from_numpy(mask.reshape(-1, out.element_size()).all(1)).view(out.shape)


def check_case(d_k, d_v, d_model, dtypes, heads, groups, tau, hopper, monkeypatch):
    monkeypatch.setattr(projection, "is_hopper", lambda device: hopper)
    layer = projection_layer(d_k, d_v, d_model, *dtypes, heads=heads, groups=groups)
    check_bytes(layer, run(layer, tau=tau)[1])
    run(layer, tau=tau, mma="rz")


@pytest.mark.parametrize("case", CASES)
def test_head_sizes_and_dtypes(case, monkeypatch):
    check_case(*CASES[case], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CASES)
def test_more_head_sizes_and_dtypes(case, monkeypatch):
    check_case(*MORE_CASES[case], monkeypatch)


def test_odd_addresses_within_nan():
    """Every product and every row of statistics is written, of these what the metrics need."""
    layer = little()
    _, session = run(layer, ["pad"])
    check_bytes(layer, session)
    stats = written(session, "stats")
    assert written(session, "products").all()
    assert stats[:, :SHORT_ROW].all() and not stats[:, SHORT_ROW:].any()


def test_results_are_equal_to_the_bit_in_any_order_of_programs():
    layer = little()
    first, session = run(layer)
    check_bytes(layer, session)
    assert written(session, "stats").all()
    other, _ = run(layer, order="reverse")
    assert all(torch.equal(other[name], first[name]) for name in SUMMED)


def test_results_hold_with_the_largest_errors_of_instructions():
    run(little(), approximation="up", mma="rz")


FAULTS = {  # what is wrong in the kernels: the edit, what the error says
    "products of the next group": (("out = products_ptr + group * (", "out = products_ptr + (group + 1) * ("),
                                   "(out of bounds|read-only memory): group_products_kernel"),
    "products behind d_k are left out": (("pieces[i], mask=rows < K_PAD)", "pieces[i], mask=rows < D_K)"),
                                         "uninitialised read: projection_stats_kernel"),
    "elements behind each row of k and v": (
        ("(row < ROWS) & (col < COLS)", "(row < ROWS)"),
        "load out of bounds: group_products_kernel|group_products_kernel (asks for|reads)"),
    "elements behind each row of q": (
        ("(rows[None, :] < d_model) & (k + row < D_K)", "(k + row < D_K)"),
        "load out of bounds: projection_stats_kernel|projection_stats_kernel (asks for|reads)"),
    "a row of stats too far": (
        ("(head * count + tiles) * STAT_FIELDS", "(head * count + tiles + 1) * STAT_FIELDS"),
        "(out of bounds|read-only memory): projection_stats_kernel"),
    "programs of a head share their sums": (("tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head", "head"),
                                            "race between CTAs on global memory: projection_scan_kernel"),
}
MORE_FAULTS = {
    "entries behind the list": (("i + each(RUNS), listed, first,", "i + each(RUNS), listed + 16, first,"),
                                "(out of bounds|uninitialised read): projection_scan_kernel"),
}


@pytest.fixture
def one_name(monkeypatch, tmp_path):
    """A folder that is called the same for every fault: Triton's cache then has the kernels without a fault once."""
    for name in [name for name in sys.modules if name.split(".")[0] == "faulty_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "kernels").mkdir()
    return tmp_path / "kernels"


def check_seen(edit, what, monkeypatch, folder):
    plant_kernel(monkeypatch, folder, "head_projection.py", edit)
    layer = little(heads=2)
    with pytest.raises((AssertionError, EmulationError), match=what), watched(stop=True) as session:
        head_delta_projection([layer], ["pad"], backend="triton")
        check_bytes(layer, session)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, one_name):
    check_seen(*FAULTS[fault], monkeypatch, one_name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", MORE_FAULTS)
def test_more_faults_are_seen(fault, monkeypatch, one_name):
    check_seen(*MORE_FAULTS[fault], monkeypatch, one_name)
