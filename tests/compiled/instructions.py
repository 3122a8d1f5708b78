"""SASS instructions of the scoring kernels for each stored pair of weights: `python -m tests.compiled.instructions`.

Of a matrix that lies flat and changed little: the whole first pass, and the scan's loop once round, one listed tile.
A lane takes FLAT_TILE / LANES of the pairs, so that an instruction of a warp counts for as many as it has lanes.
"""

from __future__ import annotations

from alps_kernels.ops.delta.tables import FLAT_TILE, LANES

from . import offline
from .cases import WANTED, score_launches

WAYS = {"first pass": ("head_delta_stats_kernel", offline.fast_path),
        "scan": ("head_delta_scan_kernel", offline.loop_path)}


def way(name: str, metrics: str, target: str = "sm_90", dtype: str = "bf16") -> list[str]:
    """Opcodes of a pass over one tile ("first pass" or "scan"), with the options of the host's own launch."""
    kernel, path = WAYS[name]
    return path(score_launches(target, dtype, metrics=metrics)[kernel].compile(target))


def of_a_pair(name: str, metrics: str, target: str = "sm_90", dtype: str = "bf16") -> float:
    return len(way(name, metrics, target, dtype)) * LANES / FLAT_TILE


def main() -> None:
    columns = [(name, metrics) for name in WAYS for metrics in WANTED]
    print(f"{'target':8}{'weights':9}" + "".join(f"{f'{name}, {metrics}':>17}" for name, metrics in columns))
    for target in offline.NVIDIA:
        for dtype in ("bf16", "fp16", "fp32"):
            print(f"{target:8}{dtype:9}" + "".join(
                f"{of_a_pair(name, metrics, target, dtype):17.2f}" for name, metrics in columns), flush=True)


if __name__ == "__main__":
    main()
