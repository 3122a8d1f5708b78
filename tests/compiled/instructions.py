"""SASS instructions of the scoring kernels: `python -m tests.compiled.instructions`.

For each stored pair of weights, of a matrix that lies flat and changed little: the whole first pass, and the scan's
loop once round, one listed tile. A lane takes FLAT_TILE / LANES of the pairs, so that an instruction of a warp counts
for as many as it has lanes.

For each element of W of `projection` that changed little: the whole first pass over heads of 128, bfloat16. On sm_100
it is that of the warps that wait for the products which one warp launches.
"""

from __future__ import annotations

from alps_kernels.ops.delta.projection import TILE_ROWS
from alps_kernels.ops.delta.tables import FLAT_TILE, LANES

from ..support.launches import Launch
from . import offline
from .cases import WANTED, projection_launches, score_launches

WAYS = {"first pass": ("head_delta_stats_kernel", offline.fast_path),
        "scan": ("head_delta_scan_kernel", offline.loop_path)}


def way(name: str, metrics: str, target: str = "sm_90", dtype: str = "bf16") -> list[str]:
    """Opcodes of a pass over one tile ("first pass" or "scan"), with the options of the host's own launch."""
    kernel, path = WAYS[name]
    return path(score_launches(target, dtype, metrics=metrics)[kernel].compile(target))


def of_a_pair(name: str, metrics: str, target: str = "sm_90", dtype: str = "bf16") -> float:
    return len(way(name, metrics, target, dtype)) * LANES / FLAT_TILE


PRODUCTS = 11  # of pieces of bfloat16 weights: q_B M_B three, dq M_B five, q_T dM three


def of_w(metrics: str, target: str = "sm_90") -> float:
    launch = projection_launches(target, metrics=metrics)["projection_stats_kernel"]
    threads = launch.argument("num_warps") * LANES
    return len(way_to_w(launch, target)) * threads / (launch.argument("RUNS") * TILE_ROWS * launch.argument("D_V"))


def way_to_w(launch: Launch, target: str) -> list[str]:
    """Opcodes of a warp in the first pass, with all the products that its rows take."""
    d_k, d_v, runs, warps = (launch.argument(name) for name in ("D_K", "D_V", "RUNS", "num_warps"))
    of_one = {"HGMMA": 16 * d_v * 16, "HMMA": 16 * 8 * 16}  # multiplications of a warp
    op = {"sm_90": "HGMMA", "sm_100": "SYNCS.PHASECHK"}.get(target, "HMMA")
    if op in of_one:
        times = PRODUCTS * runs * TILE_ROWS * d_v * d_k // (of_one[op] * warps)
    else:  # a product of a block is waited for once
        times = PRODUCTS * d_k // launch.argument("K_BLOCK")
    return offline.fast_path(launch.compile(target), op, times)


def main() -> None:
    columns = [(name, metrics) for name in WAYS for metrics in WANTED]
    print(f"{'target':8}{'weights':9}" + "".join(f"{f'{name}, {metrics}':>17}" for name, metrics in columns))
    for target in offline.NVIDIA:
        for dtype in ("bf16", "fp16", "fp32"):
            print(f"{target:8}{dtype:9}" + "".join(
                f"{of_a_pair(name, metrics, target, dtype):17.2f}" for name, metrics in columns), flush=True)
    print(f"{'target':8}{'of W':9}" + "".join(f"{f'first pass, {metrics}':>17}" for metrics in WANTED))
    for target in offline.NVIDIA:
        print(f"{target:8}{'bf16':9}" + "".join(f"{of_w(metrics, target):17.2f}" for metrics in WANTED), flush=True)


if __name__ == "__main__":
    main()
