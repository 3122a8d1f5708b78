"""Tables and launches of the kernels that score W_h = q_h^T k_g v_g^T."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..device import device_code, is_hopper, triton_type
from . import tables
from .tables import Heads, KindRow, Sums, Tables, addresses

TILE_ROWS, PIECES = 16, 3  # as csrc_triton has them
WIDEST = 512  # d_v of the kernels


def projection_sums(layers: Sequence[tuple[Any, Any, Any]], tau: float, every: bool) -> Sums:
    """Both passes over W_h of layers of one shape and of one dtype in each model.

    q is [d_k, d_model], k and v are [d_k, inner] and [d_v, inner], which differs where keys come from another model.

    Args:
        every: for all metrics, not `pad` and `euclidean` alone.
    """
    q, _, v = layers[0]
    (d_k, d_model), (d_v, inner), device = q.base.shape[1:], v.base.shape[1:], q.base.device
    tiles, heads, dtypes = -(-d_model // TILE_ROWS), Heads(), dtypes_of(layers[0])
    qs, groups, of_group, kept, align = (array("q"), array("q")), (array("q"), array("q")), array("q"), [], 16
    for q, k, v in layers:
        pairs = {pair: i for i, pair in enumerate(dict.fromkeys(zip(k.index, v.index, strict=True)))}
        of_group.extend(len(groups[0]) // 2 + pairs[pair] for pair in zip(k.index, v.index, strict=True))
        for name, dtype, of_q, of_kv in zip(("base", "task"), dtypes, qs, groups, strict=True):
            sides = [_as_read(getattr(s, name), dtype) for s in (q, k, v)]
            kept += sides  # until the kernels are launched
            if any((side.data_ptr() | side.stride(0) * side.element_size()) % 16 for side in sides):
                align = 2  # bytes
            of_q.extend(addresses(sides[0], q.index))
            of_kv.extend(chain(*zip(*(addresses(side, [pair[i] for pair in pairs])
                                      for i, side in enumerate(sides[1:])), strict=True)))
        heads.add([range(len(qs[0]) - len(q.index), len(qs[0]))], [0], d_model * d_v, tiles)
    count = len(heads.sizes)
    t = Tables(heads, [KindRow(0, tiles, tiles, d_model * d_v, TILE_ROWS * d_v)], count * tiles, device,
               *qs, of_group, *groups)
    of_form, of_stats, of_scan = _options(d_v, dtypes, device)
    k_pad, v_pad, runs = -(-d_k // of_stats["K_BLOCK"]) * of_stats["K_BLOCK"], _power_of_two(d_v), of_stats["RUNS"]
    products = torch.empty(len(groups[0]) // 2, 2, PIECES, k_pad, v_pad, dtype=torch.bfloat16, device=device)
    shape = {"BASE": triton_type(dtypes[0]), "TASK": triton_type(dtypes[1]), "ALIGN": align, "D_K": d_k, "D_V": d_v,
             "K_PAD": k_pad, "V_PAD": v_pad, "num_stages": 1 if torch.version.hip else 2, "enable_fp_fusion": True}
    kernels, given = device_code("head_projection"), (*t.others[:3], products)
    blocks = -(-k_pad // of_form["ROWS"]) * (v_pad // of_form["COLS"])
    form = partial(kernels.group_products_kernel[(len(products) * blocks,)], *t.others[3:], products,
                   **shape, **of_form, INNER=inner)
    stats = partial(kernels.projection_stats_kernel[(count * -(-tiles // runs),)], *given, t.stats, d_model, 1 / tau,
                    **shape, **of_stats, MASKED=d_v < v_pad or d_model % (runs * TILE_ROWS) > 0, ALL=every)
    scan = partial(kernels.projection_scan_kernel[(count, tables.SCANS)], *given, *t.of_scan(0), d_model, 1 / tau,
                   **shape, **of_scan)
    return t.run([form, stats], [scan], tau, every)


def _options(d_v: int, dtypes: Sequence[torch.dtype], device: torch.device) -> tuple[dict[str, int], ...]:
    """Sizes and warps of programs: of group products, of pass A and of pass B.

    W, its change and a sum of products must fit the registers. tests/compiled/test_head_projection.py holds that
    nothing spills, and names the few sizes and cards where something does.
    """
    columns, hip = _power_of_two(d_v), bool(torch.version.hip)  # AMD's warps are twice as wide: half as many
    size, hopper = max(dtype.itemsize for dtype in dtypes), is_hopper(device)
    narrow = hopper and set(dtypes) == {torch.bfloat16}  # weights are one piece each
    form = {"ROWS": 64, "COLS": min(64 if hopper else 32, columns), "D_BLOCK": 32 if narrow else 16, "num_warps": 4}
    runs, warps = max(1, min(64, 16384 // size // columns) // TILE_ROWS), (4 if columns <= 64 else 8) >> hip
    stats = {"RUNS": runs, "K_BLOCK": 16, "WIDTH": 4, "num_warps": warps}
    scan = {"RUNS": max(1, runs // 2), "K_BLOCK": 16, "num_warps": warps}  # listed tiles come in small numbers
    if narrow and columns <= 128:  # four warps multiply 64 rows together
        stats = {"RUNS": 4, "K_BLOCK": 32, "WIDTH": 2, "num_warps": 4}
        scan = {"RUNS": 4, "K_BLOCK": 16, "num_warps": 4} if d_v == columns else scan
    return form, stats, scan


def dtypes_of(layer: Sequence[Any]) -> tuple[torch.dtype, ...]:
    """What a layer's q, k and v are read as, in the base and in the task model: float32 if they differ."""
    found = ({getattr(s, name).dtype for s in layer} for name in ("base", "task"))
    return tuple(dtypes.pop() if len(dtypes) == 1 else torch.float32 for dtypes in found)


def _as_read(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, rows, cols] of this dtype whose matrices are contiguous: the same memory, or a copy."""
    blocks = blocks.to(dtype)
    return blocks if blocks[0].is_contiguous() else blocks.contiguous()


def _power_of_two(n: int) -> int:
    """The smallest that is at least n and 16."""
    return max(16, 1 << (n - 1).bit_length())
