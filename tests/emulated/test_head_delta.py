"""The scoring kernels as compiled code: scores, exact footprints, memory that nothing has written, sectors."""

import numpy as np
import pytest
import torch

pytest.importorskip("ptxemu", reason="the emulator of PTX is not on the path: make emulate")

from alps_kernels.ops import Segment, head_delta
from tests.emulated.scoring import ROUGH, SUMMED, close, footprint, pass_of, watched
from tests.ops import delta_cases
from tests.ops.delta_oracle import stored_oracle
from tests.support.mutants import plant_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def pair(shape, dtype=BF16, *task_dtype, **options):
    return delta_cases.pair(shape, dtype, *task_dtype, **options)


def segment(n, rows, cols, index=None, *dtypes, **options):
    return Segment(*pair((n, rows, cols), *dtypes, **options), tuple(range(n) if index is None else index))


def flat(*dtypes, **options):
    """Whole tiles that lie flat; of the last matrix no head."""
    return [[segment(3, 16, 256, (0, 1), *dtypes, **options)]]


def tails(*dtypes, **options):
    """Rows at odd places, of one whole tile and three elements."""
    return [[segment(2, 19, 131, None, *dtypes, **options)]]


def columns(*dtypes, **options):
    """Heads of o_proj: 64 columns each."""
    sides = (w.view(40, 3, 64).permute(1, 0, 2) for w in pair((40, 192), *dtypes, **options))
    return [[Segment(*sides, (0, 2))]]


def transposed(*dtypes, **options):
    """Heads of a Conv1D's weight: neighbours are a row of the weight apart."""
    return [[Segment(*(w.view(256, 2, 32).permute(1, 2, 0) for w in pair((256, 64), *dtypes, **options)), (0, 1))]]


def mixed(*dtypes, **options):
    """Keys and values of a group, flat matrices of two shapes among others, and a layer of another order."""
    return [[segment(2, 16, 256, None, *dtypes, **options), segment(1, 32, 128, (0, 0), *dtypes, seed=1, **options),
             segment(1, 8, 200, (0, 0), *dtypes, seed=2, **options)],
            [segment(1, 8, 200, None, *dtypes, seed=3, **options), segment(2, 16, 256, (1,), *dtypes, seed=4, **options)]]


def run(layers, metrics=SUMMED, target="sm_80", tau=1.0, **config):
    with watched(target, **config) as session:
        found = head_delta(layers, metrics, temperature=tau, backend="triton")
    close(found, stored_oracle(layers, tau), ROUGH if "approximation" in config else 2e-7)
    return found, session.launches


def check_bytes(layers, launches):
    """Pass A asks for each byte that heads read once, and for no other; pass B for none but these.

    Returns:
        sectors that pass A asks for, as a share of those bytes.
    """
    wanted, asked, sectors, bytes_read = footprint(layers), 0, 0, {}
    for launch in launches:
        names = {launch.memory.at(base).name for base in wanted}
        for base, (read, _) in launch.touched.items():
            if base in wanted:
                assert not (read & ~wanted[base]).any(), f"{launch.kernel} reads weights that no head reads"
                if pass_of(launch.kernel) == "stats":
                    bytes_read[base] = bytes_read.get(base, False) | read
        for (name, _), row in launch.traffic.by_allocation().items():
            if name in names and pass_of(launch.kernel) == "stats":
                asked, sectors = asked + row["bytes"], sectors + 32 * row["sectors"]
    assert all(np.array_equal(bytes_read[base], mask) for base, mask in wanted.items()), "pass A leaves weights out"
    total = sum(int(mask.sum()) for mask in wanted.values())
    assert asked == total, f"pass A asks for {asked} bytes of {total}"
    return sectors / total


LAYOUTS = {make.__name__: make for make in (flat, tails, columns, transposed, mixed)}


@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (FP32,), (FP32, BF16), (BF16, FP32)], ids=str)
def test_dtypes(dtypes):
    layers = flat(*dtypes)
    _, launches = run(layers)
    check_bytes(layers, launches)
    (stats,) = (launch for launch in launches if pass_of(launch.kernel) == "stats")
    wanted = footprint(layers)
    weights = {stats.memory.at(base).name for base in wanted}
    assert 32 * stats.distinct_sectors(lambda name: name in weights) == sum(int(mask.sum()) for mask in wanted.values())


@pytest.mark.parametrize("metrics", [["pad"], SUMMED], ids=["pad", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, metrics):
    layers = LAYOUTS[layout](BF16)
    _, launches = run(layers, metrics)
    sectors = check_bytes(layers, launches)
    if layout == "transposed":
        assert sectors <= 1.1, sectors


@pytest.mark.parametrize("layout, dtypes", [("tails", (FP32,)), ("tails", (FP16, FP32)), ("transposed", (FP32,))], ids=str)
def test_other_layouts_in_other_dtypes(layout, dtypes):
    layers = LAYOUTS[layout](*dtypes)
    check_bytes(layers, run(layers)[1])


@pytest.mark.parametrize("layout", ["flat", "tails"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_far_changes(dtype, layout):
    run(LAYOUTS[layout](dtype, delta=0.05))


@pytest.mark.parametrize("tau", [0.5, 20.0])
def test_temperature(tau):
    run(mixed(BF16), tau=tau)


@pytest.mark.parametrize("layout", ["flat", "mixed"])
def test_sm_90(layout):
    layers = LAYOUTS[layout](BF16)
    check_bytes(layers, run(layers, target="sm_90")[1])


@pytest.mark.parametrize("delta", [1e-3, 0.05])
def test_results_are_equal_to_the_bit_in_any_order_of_programs(delta):
    layers = mixed(BF16, delta=delta)
    first, *others = (run(layers, order=order)[0] for order in ("forward", "forward", "reverse"))
    assert all(torch.equal(other[name], first[name]) for other in others for name in SUMMED)


@pytest.mark.parametrize("approximation", ["up", "down", "random"])
def test_results_hold_with_the_largest_errors_of_approximate_instructions(approximation):
    run(mixed(BF16), approximation=approximation)
    run(flat(BF16, delta=0.05), approximation=approximation)


STATS, SUMS, HEADS = "head_delta.py", "delta_sums.py", "delta_heads.py"
FAULTS = {  # what is wrong in the kernels: the file, the edit, the layout, what the error says
    "every tile is read twice": (STATS, ("    if largest(far, RUNS) > TAYLOR:", "    if largest(far, RUNS) > -1.0:"), flat, "pass A asks for"),
    "a row of stats too far": (STATS, ("* of_run + tile) * STAT_FIELDS", "* of_run + tile + 1) * STAT_FIELDS"), flat,
                               "uninitialised read|out of bounds|read-only"),
    "the last row of a matrix is left out": (STATS, ("tl.where(run < rows, ", "tl.where(run < rows - 1, "), tails, "uninitialised read"),
    "an element behind each row": (STATS, ("base_col, mask=col < n", "base_col, mask=col <= n"), columns,
                                   "weights that no head reads|out of bounds"),
    "the first entry of a list is left out": (HEADS, ("tl.cumsum(needed.to(tl.int64), axis=0) - 1", "tl.cumsum(needed.to(tl.int64), axis=0)"),
                                              flat, "uninitialised read"),
    "entries behind the list": (HEADS, ("mask=entry < listed, other=-1)", "mask=entry <= listed + 16, other=-1)"), tails, "uninitialised read"),
    "programs of a head share their sums": (STATS, ("tl.program_id(1).to(tl.int64) * tl.num_programs(0) + head", "head"), flat, "race between CTAs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(fault, monkeypatch, tmp_path):
    file, edit, make, what = FAULTS[fault]
    plant_kernel(monkeypatch, tmp_path, file, edit)
    layers = make(BF16)
    with pytest.raises(AssertionError, match=what), watched() as session:
        try:
            head_delta(layers, ["pad"], backend="triton")
        except pytest.fail.Exception:
            pass  # sums that are wrong may look as if a head were doubtful
        if not session.faults:
            check_bytes(layers, session.launches)
