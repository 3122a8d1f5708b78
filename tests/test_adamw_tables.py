"""The work list of the AdamW kernel covers the selection exactly once; plans follow the addresses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alps_kernels.binding import BoundParam, merge
from alps_kernels.ops import device_code, head_adamw
from alps_kernels.ops.adamw_tables import COLS, ROWS, VECTOR, Tile, aligned, pointers_of, tiles_of
from alps_kernels.ops.updates import Hyper, Update
from alps_kernels.state import Slot

HYPER = Hyper(*[1.0] * len(Hyper._fields))


def update_of(part, spans=None, *, grad=None, low=None):
    slot = Slot(part, spans or part.ranges, 0, None, torch.float32, torch.float32)
    n_hypers = len(slot.spans) if spans else 1
    state = slot.zeros(torch.float32)
    return Update(part.name, part.param, torch.zeros_like(part.param) if grad is None else grad,
                  None if part.full and n_hypers == 1 else slot.blocks, state, torch.zeros_like(state), None, low,
                  None, (HYPER,) * n_hypers, 0)


@st.composite
def parts(draw):
    """A parameter of 1 to 3 dimensions, some of its rows or columns, and spans that cut the ranges."""
    shape = draw(st.sampled_from([(37,), (48, 70), (5, 300), (130, 3), (16, 64), (6, 4, 5), (2100,), (48, 128)]))
    dim = draw(st.integers(0, 1)) if len(shape) > 1 else 0
    extent = shape[0] if dim == 0 else torch.Size(shape[1:]).numel()
    unit = draw(st.sampled_from([1, 8]))
    edges = sorted(draw(st.lists(st.integers(0, extent // unit), min_size=2, max_size=6)))
    ranges = merge((a * unit, b * unit) for a, b in zip(edges[::2], edges[1::2], strict=False))
    pad = draw(st.sampled_from([0, 8])) if len(shape) == 2 else 0
    base = torch.zeros(shape if not pad else (shape[0], shape[1] + pad))
    param = nn.Parameter(base[:, :shape[1]] if pad else base)
    cuts = {draw(st.integers(a, b)) for a, b in ranges}
    spans = tuple(span for a, b in ranges for span in _cut(a, b, cuts))
    return BoundParam("w", param, dim, ranges), draw(st.sampled_from([None, spans]))


def _cut(start, stop, cuts):
    edges = [start, *sorted(c for c in cuts if start < c < stop), stop]
    return list(zip(edges[:-1], edges[1:], strict=True))


def walk(tiles):
    """(tile, row, col) of every element that the kernel's mask lets through."""
    for row in tiles.tolist():
        tile = Tile(*row)
        for r in range(ROWS):
            for c in range(COLS):
                if c < tile.n_cols and r * COLS + c < tile.limit:
                    yield tile, r, c


@settings(max_examples=60, deadline=None)
@given(case=parts())
def test_tiles_cover_the_selection_exactly_once(case):
    part, spans = case
    if not part.ranges:
        return
    update = update_of(part, spans)
    if not update.launchable:  # all of a parameter with a gap between its rows: the reference's
        return
    memory = part.param.detach().as_strided((part.param.untyped_storage().nbytes() // 4,), (1,))
    memory.copy_(torch.arange(memory.numel()))  # every element says where it lies
    memory = memory.tolist()
    want = part.cut(part.param.detach()).tolist()  # state element -> place of the parameter
    places = part.cut(torch.arange(part.param.numel()).view(part.param.shape)).tolist()
    grads = update.grad.as_strided((update.grad.untyped_storage().nbytes() // 4,), (1,))
    update.grad.copy_(torch.arange(part.param.numel()).view(part.param.shape))
    seen = [None] * part.numel
    for tile, r, c in walk(tiles_of(update, 3, 10)):
        at = tile.s_off + r * tile.s_stride + c
        assert tile.param == 3 and seen[at] is None, "an element is visited twice"
        seen[at] = tile.hyper
        assert memory[tile.p_off + r * tile.p_stride + c] == want[at]
        assert grads[tile.g_off + r * tile.g_stride + c] == places[at]
    assert None not in seen, "an element is left out"
    ages = torch.zeros(part.param.shape, dtype=torch.int64)
    for index, block in enumerate(update.blocks or ()):
        block.of(ages).fill_(index if update.n_hypers > 1 else 0)
    assert [hyper - 10 for hyper in seen] == part.cut(ages).tolist(), "an element has another age's numbers"


def test_a_run_of_whole_rows_is_flat_and_aligned():
    """Adjacent heads are one run: full tiles, but for the last."""
    part = BoundParam("q", nn.Parameter(torch.zeros(512, 576)), 0, ((64, 256),))
    tiles = tiles_of(update_of(part), 0, 0)
    assert len(tiles) == 192 * 576 // (ROWS * COLS) and (tiles[:, 9] == ROWS * COLS).all()
    assert aligned(tiles, (16,) * 6)


@pytest.mark.parametrize("part, fits", [
    (lambda: BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((32, 64),)), True),
    (lambda: BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((30, 64),)), False),
    (lambda: BoundParam("q", nn.Parameter(torch.zeros(64, 33)), 0, ((1, 5),)), False),
    (lambda: BoundParam("b", nn.Parameter(torch.zeros(96)), 0, ((32, 64),)), True),
    (lambda: BoundParam("b", nn.Parameter(torch.zeros(97)), 0, ((0, 97),)), False),
])
def test_alignment_is_found(part, fits):
    update = update_of(part())
    assert aligned(tiles_of(update, 0, 0), pointers_of(update, 0)) is fits


def test_an_address_off_by_four_bytes_is_not_aligned():
    base = torch.zeros(65)
    part = BoundParam("b", nn.Parameter(base[1:]), 0, ((0, 64),))
    assert not aligned(tiles_of(update := update_of(part), 0, 0), pointers_of(update, 0))


def test_what_the_kernel_cannot_address_is_known():
    assert update_of(BoundParam("w", nn.Parameter(torch.zeros(4, 5)), 0, ((0, 2),))).launchable
    assert update_of(BoundParam("w", nn.Parameter(torch.zeros(4, 8)[:, :5]), 1, ((0, 2),))).launchable
    assert not update_of(BoundParam("w", nn.Parameter(torch.zeros(5, 4).t()), 0, ((0, 2),))).launchable
    assert not update_of(BoundParam("w", nn.Parameter(torch.zeros(4, 8)[:, :5]), 0, ((0, 4),))).launchable
    assert not update_of(BoundParam("w", nn.Parameter(torch.zeros(4, 5).double()), 0, ((0, 2),))).launchable


def test_offsets_beyond_2_to_the_31():
    """On the meta device: 70,000 x 40,000 elements, the last rows of them."""
    param = nn.Parameter(torch.empty(70_000, 40_000, device="meta"))
    part = BoundParam("w", param, 0, ((69_990, 70_000),))
    slot = Slot(part, part.ranges, 0, None, torch.float32, torch.float32)
    state = torch.empty(part.numel, device="meta")
    update = Update("w", param, param, slot.blocks, state, state, None, None, None, (HYPER,), 0)
    tiles = tiles_of(update, 0, 0)
    assert tiles.dtype == torch.int64 and tiles[:, 2].min() == 69_990 * 40_000
    last = Tile(*tiles[tiles[:, 2].argmax()].tolist())
    assert last.p_off + last.limit == 70_000 * 40_000


def test_a_plan_is_kept_and_its_addresses_follow():
    part = BoundParam("w", nn.Parameter(torch.zeros(64, 64)), 0, ((8, 16),))
    plans = {}
    first = head_adamw._plan(plans, ("key",), [update := update_of(part)], 0)
    assert head_adamw._plan(plans, ("key",), [update], 0) is first
    other = update_of(part, grad=torch.zeros(64, 64))
    table = first.table
    assert head_adamw._plan(plans, ("key",), [other], 0) is first and first.table is not table
    assert first.table[0, 1] == other.grad.data_ptr()
    strided = update_of(part, grad=torch.zeros(64, 72)[:, :64])
    assert head_adamw._plan(plans, ("key",), [strided], 0) is not first
    shifted = torch.zeros(64 * 64 + 1)[1:].view(64, 64)
    known = head_adamw._plan(plans, ("key",), [update], 0)
    assert head_adamw._plan(plans, ("key",), [update_of(part, grad=shifted)], 0) is not known


def test_tensors_of_one_dtype_triple_share_a_launch_and_odd_ones_take_another():
    good = [update_of(BoundParam(str(i), nn.Parameter(torch.zeros(64, 64)), 0, ((0, 8 * i + 8),))) for i in range(5)]
    assert len(head_adamw._plan(None, (), good, 0).tiles) == 1
    odd = update_of(BoundParam("odd", nn.Parameter(torch.zeros(7)), 0, ((0, 7),)))
    plan = head_adamw._plan(None, (), [*good, odd], 0)
    assert [hint for _, hint in plan.tiles] == [True, False] and len(plan.tiles[1][0]) == 1


def test_device_code_of_another_version_is_refused(monkeypatch):
    import csrc_triton

    monkeypatch.setattr(csrc_triton, "ABI", 999)
    with pytest.raises(ImportError, match="ABI 999, alps_kernels calls ABI 1"):
        device_code("head_adamw")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        head_adamw.head_adamw_([], backend="cuda")


def test_tables_have_the_columns_the_kernel_reads():
    kernel = device_code("head_adamw")
    assert kernel.TILE_FIELDS.value == len(Tile._fields) and kernel.HYPER_FIELDS.value == len(Hyper._fields)
    part = BoundParam("w", nn.Parameter(torch.zeros(8)), 0, ((0, 8),))
    assert kernel.POINTER_FIELDS.value == len(pointers_of(update_of(part), 2**64 - 1))
    assert pointers_of(update_of(part), 2**64 - 1)[-1] == -1 and VECTOR == 8
