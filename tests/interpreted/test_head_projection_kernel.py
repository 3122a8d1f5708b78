"""The kernels of `projection`, run by the interpreter, against long doubles: scores, and what they are formed from."""

import pytest
import torch
import triton
import triton.language as tl
from einops import rearrange

from alps_kernels.ops import Segment, head_delta_projection
from alps_kernels.ops.delta import oracle as plain, projection, tables as delta_tables
from csrc_triton.delta_sums import each
from csrc_triton.head_projection import TILE_ROWS, _chunks, _form
from tests.interpreted.test_head_delta_kernel import (  # noqa: F401, fixtures
    SUMMED, close, kept, left_over, resize, small_tiles,
)
from tests.ops.delta_cases import projection_layer, segment
from tests.ops.delta_oracle import projection_oracle

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def unset_is_nan():
    """torch.empty is full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("d_k, d_v, d", [(16, 16, 40), (20, 24, 33), (64, 64, 48)])
def test_projection_equals_the_oracle(d_k, d_v, d):
    group = (0, 0, 1, 1)
    layer = (segment(4, d_k, d, delta=1e-3), segment(2, d_k, d, group, seed=1), segment(2, d_v, d, group, seed=2))
    other = (segment(2, d_k, d, seed=3), segment(2, d_k, d, seed=4), segment(2, d_v, d, seed=5))
    found = head_delta_projection([layer, other], SUMMED, backend="triton")
    close(found, projection_oracle([layer, other]))
    close(found, plain.head_delta_projection([layer, other], SUMMED))


@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_projection_at_other_temperatures(tau):
    layer = tuple(segment(2, 16, 40, seed=seed, delta=1e-3) for seed in range(3))
    layer = tuple(Segment(4 * s.base, 4 * s.task, s.index) for s in layer)  # so that the weights, not the uniform part, decide
    close(head_delta_projection([layer], SUMMED, temperature=tau, backend="triton"), projection_oracle([layer], tau))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="each is compiled anew: see tests/emulated")
@pytest.mark.parametrize("d_k, d_v, d_model, dtypes, heads, groups, tau, hopper", [
    (64, 64, 40, (BF16,), 4, 1, 0.5, False),
    (64, 64, 20, (FP32, BF16), 8, 1, 1.0, False),
    (80, 80, 50, (BF16,), 2, 2, 2.0, True),  # a K block ends beyond d_k
    (80, 80, 33, (FP16,), 4, 2, 2.0, False),
    (96, 96, 40, (BF16, FP32), 2, 2, 0.5, False),
    (128, 128, 40, (FP32,), 1, 1, 1.0, False),
    (128, 64, 40, (FP16, BF16), 1, 1, 1.0, True),
    (64, 256, 20, (FP32,), 1, 1, 2.0, False),
    (256, 256, 20, (BF16,), 1, 1, 0.5, False)])
def test_projection_of_all_head_sizes_and_dtypes(d_k, d_v, d_model, dtypes, heads, groups, tau, hopper, monkeypatch,
                                                 unset_is_nan):
    monkeypatch.setattr(projection, "is_hopper", lambda device: hopper)
    layer = projection_layer(d_k, d_v, d_model, *dtypes, heads=heads, groups=groups)
    close(head_delta_projection([layer], SUMMED, temperature=tau, backend="triton"), projection_oracle([layer], tau))


@triton.jit
def form_kernel(
    bases_ptr, tasks_ptr, groups_ptr, products_ptr, out_ptr, d_model,
    BASE: tl.constexpr, TASK: tl.constexpr, ALIGN: tl.constexpr, D_K: tl.constexpr, D_V: tl.constexpr,
    K_PAD: tl.constexpr, V_PAD: tl.constexpr, RUNS: tl.constexpr, K_BLOCK: tl.constexpr,
):
    """W, its change and what is there, as pass A has them: out [programs, halves of tiles, 3, lanes, 16] float32."""
    programs = tl.cdiv(tl.cdiv(d_model, TILE_ROWS), RUNS)
    head, tiles = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * RUNS + each(RUNS)
    w, dw = _form(head, tiles, bases_ptr, tasks_ptr, groups_ptr, products_ptr, d_model,
                  BASE, TASK, ALIGN, D_K, D_V, K_PAD, V_PAD, RUNS, K_BLOCK)
    chunks = _chunks(w, dw, tiles, d_model, D_V, RUNS)
    LANES: tl.constexpr = chunks[2].shape[0]
    out_ptr += tl.program_id(0) * (6 * LANES * 16)
    place = tl.arange(0, LANES)[:, None] * 16 + tl.arange(0, 8)[None, :]
    for half in tl.static_range(2):
        for i in tl.static_range(3):
            for eight in tl.static_range(2):
                tl.store(out_ptr + ((half * 3 + i) * LANES * 16 + eight * 8) + place,
                         chunks[3 * half + eight][i].to(tl.float32))


def formed(layer, monkeypatch):
    """M_B and dM of the groups, as the first kernel stores them; W and dW of the heads, as pass A forms them."""
    monkeypatch.setattr(delta_tables.Tables, "run", lambda self, stats, *_: stats)
    form, stats = projection.projection_sums([layer], 1.0, False)
    form()
    products, d_model = form.args[2], layer[0].base.shape[2]
    options = {name: value for name, value in stats.keywords.items() if name not in ("MASKED", "WIDTH", "ALL")}
    heads, runs, columns = len(layer[0].index), options["RUNS"], options["V_PAD"]
    programs = -(-d_model // (16 * runs))
    out = torch.full((heads * programs, 2, 3, runs * 8 * columns // 16, 16), torch.nan)
    form_kernel[(heads * programs,)](*stats.args[:4], out, d_model, **options)
    w, dw, there = rearrange(out, "(head p) half what (run row lane) col -> what head (p run half row) (lane col)",
                             head=heads, run=runs, row=8)
    d_v = options["D_V"]
    expected = (torch.arange(w.shape[1])[:, None] < d_model) & (torch.arange(columns) < d_v)
    assert (there == expected.float()).all()
    in_order = rearrange(
        products.double().sum(2), "head which k (group eight thread two) -> head which k (group thread eight two)",
        group=max(1, columns // 64), thread=4, two=2)
    return in_order, w[:, :d_model, :d_v], dw[:, :d_model, :d_v]


def same(found, expected):
    """Relative to the root mean square: that of errors, and the largest of them."""
    wrong, scale = (found.double() - expected).abs(), expected.square().mean().sqrt()
    assert wrong.square().mean().sqrt() <= 2e-7 * scale and wrong.max() <= 1.5e-6 * scale, (wrong / scale).max()


@pytest.mark.parametrize("dtypes, hopper", [
    ((BF16,), False), ((BF16,), True), ((FP16,), False), ((FP32,), False), ((BF16, FP32), False)])
def test_projection_forms_products_and_heads_to_float32(dtypes, hopper, monkeypatch, unset_is_nan):
    """Changes are as large as the weights, which become up to 2^16 times smaller: what a change lacks shows."""
    monkeypatch.setattr(projection, "is_hopper", lambda device: hopper)
    generator = torch.Generator().manual_seed(3)
    layer = []
    for s in projection_layer(24, 72, 200, *dtypes):
        sizes = torch.rand(2, *s.base.shape, generator=generator)
        task = s.base * (1 + 3 * sizes[0]) * torch.exp2(-16 * sizes[1])
        layer.append(Segment(s.base, task.to(s.task.dtype), s.index))
    (m, dm), w, dw = (x[0] for x in formed(layer, monkeypatch))
    (qb, kb, vb), (qt, kt, vt) = ([getattr(s, side)[0].double() for s in layer] for side in ("base", "task"))
    same(m[:24, :72], kb @ vb.mT)
    same(dm[:24, :72], kt @ vt.mT - kb @ vb.mT)
    assert all((x[24:] == 0).all() and (x[:, 72:] == 0).all() for x in (m, dm))
    same(w, qb.mT @ (kb @ vb.mT))
    same(dw, qt.mT @ (kt @ vt.mT) - qb.mT @ (kb @ vb.mT))


def test_two_pieces_hold_any_change(monkeypatch):
    """A weight of 1 that becomes one of 2^-9 and a little, and the like: 17 bits of difference, and more."""
    sizes = torch.tensor([2.0**-i * (1 + j / 128) for i in range(20) for j in (0, 1, 64, 127)])
    q = torch.stack([torch.ones(80), -torch.ones(80), torch.full((80,), 1 + 127 / 128), sizes])
    one = torch.eye(16)[None, :4, :].bfloat16()
    layer = (Segment(q[None].bfloat16(), sizes.expand(1, 4, 80).bfloat16(), (0,)), Segment(one, one, (0,)),
             Segment(one, one, (0,)))
    _, _, dw = formed(layer, monkeypatch)
    assert torch.equal(dw[0].double(), (sizes - q).T.double())


def test_small_products_add_up_beside_a_large_one(monkeypatch):
    """The sum of a block of them is 0.4 units in the last place of the whole sum: without Kahan's rest it is lost."""
    k = torch.full((1, 16, 600), 0.4**0.5 * 2.0**-13.5)
    k[:, :, 0] = 1.0
    products, *_ = formed((segment(1, 16, 600), Segment(k, 2 * k, (0,)), Segment(k, k, (0,))), monkeypatch)
    for found in products[0]:
        same(found[:16, :16], k[0].double() @ k[0].double().mT)


def test_keys_and_values_of_another_width_than_queries():
    """Attention over another model's states."""
    q, k, v = (segment(2, 16, width, seed=seed) for seed, width in enumerate((40, 24, 24)))
    others = (segment(2, 16, 40, seed=3), *(segment(2, 16, 72, seed=seed) for seed in (4, 5)))
    found = head_delta_projection([(q, k, v), others], SUMMED, backend="triton")
    close(found, projection_oracle([(q, k, v), others]))


@pytest.mark.parametrize("dtype, of_q, of_k", [
    (BF16, 1000.0, 1e-3), (FP16, 1000.0, 1e-3), (FP32, 1e-6, 1e6), (FP32, 2.0**40, 2.0**-40),
    (BF16, 2.0**-40, 2.0**40)])
def test_scales_of_q_and_k_that_cancel(dtype, of_q, of_k):
    """Pieces have float32's range."""
    layer = q, k, v = projection_layer(16, 16, 40, dtype, heads=2)
    scaled = (*(Segment((x * s.base.float()).to(dtype), (x * s.task.float()).to(dtype), s.index)
                for x, s in ((of_q, q), (of_k, k))), v)
    found = head_delta_projection([scaled], SUMMED, backend="triton")
    close(found, projection_oracle([scaled]))
    if max(of_q, of_k) == 2.0**40:  # no bit changes
        expected = head_delta_projection([layer], SUMMED, backend="triton")
        assert all(torch.equal(found[name], expected[name]) for name in SUMMED)


def in_gaps(side):
    """Matrices as they are, at an odd place; between them NaN."""
    room = torch.full((len(side), side.shape[1] + 3, side.shape[2]), torch.nan, dtype=side.dtype)
    room[:, 1:-2] = side
    return room[:, 1:-2]


def of_wider(side):
    room = torch.full((len(side), side.shape[1] + 2, side.shape[2] + 8), torch.nan, dtype=side.dtype)
    room[:, 1:-1, 5:-3] = side
    return room[:, 1:-1, 5:-3]


def of_transposed(side):
    """As a Conv1D stores it, [d_model, heads of d]."""
    room = torch.full((side.shape[2] + 2, len(side) * side.shape[1] + 4), torch.nan, dtype=side.dtype)
    room[1:-1, 1:-3] = rearrange(side, "head d m -> m (head d)")
    return rearrange(room[1:-1, 1:-3], "m (head d) -> head d m", head=len(side))


@pytest.mark.parametrize("of_base, of_task", [
    (in_gaps, in_gaps), (of_wider, in_gaps), (in_gaps, of_transposed), (of_transposed, of_wider)])
def test_projection_reads_views_and_nothing_around_them(of_base, of_task):
    layer = projection_layer(20, 24, 33, BF16, heads=2)
    views = [Segment(of_base(s.base), of_task(s.task), s.index) for s in layer]
    close(head_delta_projection([views], SUMMED, backend="triton"), projection_oracle([layer]))


def test_q_k_and_v_of_different_dtypes():
    layer = tuple(Segment(s.base.to(one), s.task.to(other), s.index) for s, one, other in zip(
        projection_layer(16, 16, 40, heads=2), (BF16, FP32, FP16), (FP16, FP16, FP32), strict=True))
    close(head_delta_projection([layer], SUMMED, backend="triton"), projection_oracle([layer]))


def test_listed_tiles_of_a_head_lie_far_apart(kept, unset_is_nan):
    """Columns of q change in a few tiles of 12, which alone are listed; a program of pass B takes two at a time."""
    changed = [], [11], [3, 11], [0, 4, 5, 9, 11]
    q, k, v = projection_layer(16, 16, 16 * 12, heads=4)
    k, v, task = Segment(k.base, k.base, k.index), Segment(v.base, v.base, v.index), q.base.clone()
    for head, tiles in enumerate(changed):
        for i, tile in enumerate(tiles):
            task[head, :, 16 * tile:16 * tile + 16] *= 1 + 0.003 * (-1) ** i
    layer = Segment(q.base, task, q.index), k, v
    found = head_delta_projection([layer], SUMMED, backend="triton")
    close(*({name: x[1:] for name, x in scores.items()} for scores in (found, projection_oracle([layer]))))
    assert all(x[0] == 0 for x in found.values())
    tables, sums = kept[0]
    assert sums.s.listed.tolist() == [len(tiles) for tiles in changed]
    assert [(row[:len(tiles)] // 2 - 12 * head).tolist() for head, (row, tiles) in enumerate(
        zip(tables._list, changed, strict=True))] == list(changed)


def far_changes(dtype):
    """Of head 0 in one tile alone, beside which others are listed that are near; of head 1 in all."""
    layer = q, _, _ = projection_layer(16, 24, 100, dtype, heads=2)
    noise = 0.25 * torch.randn(q.task.shape, generator=torch.Generator().manual_seed(3))
    noise[0, :, :40] = noise[0, :, 44:] = 0.0
    q.task.mul_(1 + noise)
    return layer


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_far_changes_of_a_projection(dtype, kept):
    layer = far_changes(dtype)
    close(head_delta_projection([layer], SUMMED, backend="triton"), projection_oracle([layer]))
    odd = kept[0][0]._list[0, :int(kept[0][1].s.listed[0])] % 2
    assert odd.sum() == 1 and len(odd) > 1
