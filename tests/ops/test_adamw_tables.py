"""The work list of the AdamW kernel covers the selection exactly once; plans follow the addresses."""

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from torch import nn

from alps_kernels.ops import HyperRow, HyperTable, ParamUpdate, n_scales
from alps_kernels.ops.adamw import op
from alps_kernels.ops.adamw.tables import QUANTUM, TILE, VECTOR, Pointers, Tile, aligned, pointers_of, tiles_of
from alps_kernels.ops.device import device_code
from alps_kernels.optim.state import Slot
from alps_kernels.selection import BoundParam
from alps_kernels.tensors import merge


def update_of(part, spans=None, *, grad=None, slice_ranges=None, weight_copy=None):
    slot = Slot(part, spans or part.ranges, 0, None, torch.float32, torch.float32, slice_ranges)
    n_rows = len(slot.spans) if spans else 1
    state = slot.new_state(amsgrad=False, device_step=False)
    return ParamUpdate(part.name, part.param, torch.zeros_like(part.param) if grad is None else grad,
                  None if part.full and n_rows == 1 and weight_copy is None else slot.blocks, state["exp_avg"],
                  state["exp_avg_sq"], n_rows=n_rows, weight_copy=weight_copy)


def places(tensor):
    """The memory under a tensor, every element of which says where it lies."""
    memory = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // 4,), (1,))
    memory.copy_(torch.arange(memory.numel()))
    return memory.tolist()


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
    """(tile, k, row, column) of every element that the kernel's mask lets through."""
    for row in tiles.tolist():
        tile = Tile(*row)
        for k in range(min(tile.limit, TILE)):
            yield tile, k, *divmod(tile.first + k, tile.width)


# The same cases each time, and no shrinking: planted faults must be seen, and soon.
@settings(max_examples=60, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(case=parts())
def test_tiles_cover_the_selection_exactly_once(case):
    part, spans = case
    if not part.ranges:
        return
    update = update_of(part, spans)
    if not update.launchable:  # all of a parameter with a gap between its rows: the CPU backend's
        return
    memory = places(part.param)
    want = part.cut(part.param.detach()).tolist()  # state element -> place of the parameter
    of_grad = part.cut(torch.arange(part.param.numel()).view(part.param.shape)).tolist()
    grads = update.grad.as_strided((update.grad.untyped_storage().nbytes() // 4,), (1,))
    update.grad.copy_(torch.arange(part.param.numel()).view(part.param.shape))
    seen, scales = [None] * part.numel, [None] * part.numel
    tiles = tiles_of(update, 3)
    assert (tiles[:, 10] > 0).all() and (tiles[:, 10] <= TILE).all()
    for tile, k, r, c in walk(tiles):
        at = tile.s_off + r * tile.s_stride + c
        assert tile.param == 3 and seen[at] is None, "an element is visited twice"
        seen[at], scales[at] = tile.hyper, tile.scale + k // QUANTUM
        assert memory[tile.p_off + r * tile.p_stride + c] == want[at]
        assert grads[tile.g_off + r * tile.g_stride + c] == of_grad[at]
    assert None not in seen, "an element is left out"
    ages, quanta = torch.zeros(2, *part.param.shape, dtype=torch.int64)
    first = 0
    for block in update.blocks or ():
        block.of(ages).fill_(block.span if update.n_rows > 1 else 0)
        inside = block.of(quanta)
        inside.copy_(first + torch.arange(inside.numel()).view(inside.shape) // QUANTUM)
        first += n_scales(inside.numel())
    if update.blocks is None:
        quanta = torch.arange(part.numel).view(part.param.shape) // QUANTUM
    right = seen == part.cut(ages).tolist(), scales == part.cut(quanta).tolist()  # pytest is slow to print long lists
    assert right[0], "an element has another age's numbers"
    assert right[1], "an element has another 64's scale"


@settings(max_examples=30, deadline=None)
@given(dim=st.integers(0, 1), edges=st.sets(st.integers(0, 40), min_size=2, max_size=6), spans=st.booleans())
def test_tiles_of_a_leaf_find_its_elements_in_the_full_weight(dim, edges, spans):
    edges = sorted(edges)[:len(edges) // 2 * 2]
    ranges = merge(zip(edges[::2], edges[1::2], strict=True))
    weight = torch.zeros(40, 40 + 8)[:, :40]
    memory = places(weight)
    selected = torch.cat([weight.narrow(dim, a, b - a) for a, b in ranges], dim).contiguous()
    leaf, size = nn.Parameter(selected), selected.shape[dim]
    cut = ((0, size // 2), (size // 2, size)) if spans and size > 1 else None
    update = update_of(BoundParam("w", leaf, dim, ((0, size),)), cut, slice_ranges=ranges,
                       weight_copy=weight)
    of_leaf, found = leaf.detach().reshape(-1).tolist(), []
    for tile, _, r, c in walk(tiles_of(update, 0)):
        at = tile.p_off + r * tile.p_stride + c
        assert memory[tile.copy_off + r * tile.copy_stride + c] == of_leaf[at]
        found.append(at)
    assert sorted(found) == list(range(leaf.numel()))


def test_a_run_of_whole_rows_is_flat_and_aligned():
    """Adjacent heads are one run: full tiles, but for the last."""
    part = BoundParam("q", nn.Parameter(torch.zeros(512, 576)), 0, ((64, 256),))
    tiles = tiles_of(update_of(part), 0)
    assert len(tiles) == 192 * 576 // TILE and (tiles[:, 10] == TILE).all()
    assert aligned(tiles, (16,) * len(Pointers._fields))


def test_columns_of_heads_fill_their_tiles():
    """8 rows of 128 columns, or 10 2/3 rows of 96: no tile but the last is short."""
    for width in (128, 96, 80):
        part = BoundParam("o", nn.Parameter(torch.zeros(64, 4 * width)), 1, ((width, 2 * width),))
        tiles = tiles_of(update_of(part), 0)
        assert len(tiles) == -(-64 * width // TILE) and (tiles[:-1, 10] == TILE).all()


@pytest.mark.parametrize("part, fits", [
    (lambda: BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((32, 64),)), True),
    (lambda: BoundParam("o", nn.Parameter(torch.zeros(64, 96)), 1, ((30, 64),)), False),
    (lambda: BoundParam("q", nn.Parameter(torch.zeros(64, 33)), 0, ((1, 5),)), False),
    (lambda: BoundParam("b", nn.Parameter(torch.zeros(96)), 0, ((32, 64),)), True),
    (lambda: BoundParam("b", nn.Parameter(torch.zeros(97)), 0, ((0, 97),)), False),
])
def test_alignment_is_found(part, fits):
    update = update_of(part())
    assert aligned(tiles_of(update, 0), pointers_of(update, 0)) is fits


def test_an_address_off_by_four_bytes_is_not_aligned():
    base = torch.zeros(65)
    part = BoundParam("b", nn.Parameter(base[1:]), 0, ((0, 64),))
    assert not aligned(tiles_of(update := update_of(part), 0), pointers_of(update, 0))


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
    update = ParamUpdate("w", param, param, slot.blocks, state, state)
    tiles = tiles_of(update, 0)
    assert tiles.dtype == torch.int64 and tiles[:, 2].min() == 69_990 * 40_000
    last = Tile(*tiles[tiles[:, 2].argmax()].tolist())
    assert last.p_off + last.limit == 70_000 * 40_000


def test_a_plan_is_kept_and_its_addresses_follow():
    part = BoundParam("w", nn.Parameter(torch.zeros(64, 64)), 0, ((8, 16),))
    launches = op.Launches()
    plan = lambda update: launches.plan(("key",), [update], 0)  # noqa: E731
    first = plan(update := update_of(part))
    assert plan(update) is first
    first.upload()
    other = update_of(part, grad=torch.zeros(64, 64))
    assert plan(other) is first and first.upload() is None and first.stage.pointers[0, 1] == other.grad.data_ptr()
    assert plan(update_of(part, grad=torch.zeros(64, 72)[:, :64])) is not first
    known = plan(update)
    shifted = torch.zeros(64 * 64 + 1)[1:].view(64, 64)
    assert plan(update_of(part, grad=shifted)) is not known


def test_tensors_of_one_dtype_triple_share_a_launch_and_odd_ones_take_another():
    good = [update_of(BoundParam(str(i), nn.Parameter(torch.zeros(64, 64)), 0, ((0, 8 * i + 8),))) for i in range(5)]
    assert len(op.Launches().plan((), good, 0).parts) == 1
    odd = update_of(BoundParam("odd", nn.Parameter(torch.zeros(7)), 0, ((0, 7),)))
    plan = op.Launches().plan((), [*good, odd], 0)
    assert [part.step.constants["ALIGNED"] for part in plan.parts] == [True, False]
    assert [(part.step.n, part.norm.n, len(part.tiles)) for part in plan.parts] == [(9, 2, 16), (1, 2, 16)]


def test_device_code_of_another_version_is_refused(monkeypatch):
    import csrc_triton

    monkeypatch.setattr(csrc_triton, "ABI", 999)
    with pytest.raises(ImportError, match="ABI 999, alps_kernels calls ABI 6"):
        device_code("head_adamw")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        op.head_adamw_([], HyperTable(), backend="cuda")


def test_tables_have_the_columns_the_kernel_reads():
    kernel = vars(device_code("head_adamw"))
    for prefix, row in (("TILE_", Tile), ("POINTER_", Pointers), ("HYPER_", HyperRow)):
        columns = {name.removeprefix(prefix): value.value for name, value in kernel.items() if name.startswith(prefix)}
        names = ["INV_ROOT2" if name == "root2" else name.upper() for name in row._fields]  # `packed` inverts it
        assert columns == {name: i for i, name in enumerate([*names, "FIELDS"])}
    part = BoundParam("w", nn.Parameter(torch.zeros(8)), 0, ((0, 8),))
    assert pointers_of(update_of(part), 2**64 - 1)[-1] == -1 and VECTOR == 8
