"""Every order of packed rows against weights packed by hand, and faults in the table that must show."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from alps_kernels.layout import find_heads, packed_qkv
from alps_kernels.layout.head_sizes import Sizes
from alps_kernels.layout.packed_qkv import ROWS, Owned, row_numbers
from alps_kernels.layout.projections import Candidate, Projection
from tests.support.mutants import plant

WIDTH, D = 10, 3  # features into the projections, and the size of a head; no two sizes of a case are equal


def parts_of(heads: int, size: int = D) -> list[Tensor]:
    """One random matrix per head."""
    return [torch.randn(size, WIDTH) for _ in range(heads)]


def pack(*matrices: list[Tensor]) -> Tensor:
    return torch.cat([matrix for matrices_of_part in matrices for matrix in matrices_of_part])


def candidate(class_name: str, **stated) -> Candidate:
    """An attention module that holds no weights, of a class of that name with those attributes."""
    module = type(class_name, (nn.Module,), {})()
    for name, value in stated.items():
        setattr(module, name, value)
    return Candidate("attn", {"": nn.Module(), "attn": module}, {}, SimpleNamespace())


def linear(name: str, weight: Tensor) -> Projection:
    return Projection(f"attn.{name}", name, None, n_out=weight.shape[0], n_in=weight.shape[1])


def output(heads: int, size: int = D) -> tuple[Projection, list[Tensor], Tensor]:
    """The output projection, the columns of each head, and the weight that they lie in one behind the other."""
    columns = [torch.randn(WIDTH, size) for _ in range(heads)]
    weight = torch.cat(columns, 1)
    return Projection("attn.o", "o", None, n_out=WIDTH, n_in=heads * size), columns, weight


def cut_out(owned: Owned, weights: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """What the slices of every role cut out of the weights, head by head or group by group."""
    found: dict[str, list[Tensor]] = {}
    for unit in (*owned.heads, *owned.groups):
        for part in unit:
            found.setdefault(part.role, []).append(part.of(weights[part.param]))
    return found


def same(found: dict[str, list[Tensor]], want: dict[str, list[Tensor]]) -> bool:
    return found.keys() == want.keys() and all(
        len(found[role]) == len(want[role]) and all(map(torch.equal, found[role], want[role])) for role in want
    )


def separate_projections(n: int = 4, g: int = 2):
    q, k, v = parts_of(n), parts_of(g), parts_of(g, 5)
    out, o, o_weight = output(n, 5)
    weights = {"q": pack(q), "k": pack(k), "v": pack(v), "o": o_weight}
    q_proj, k_proj, v_proj = (linear(role, weights[role]) for role in "qkv")
    owned = packed_qkv.separate(q_proj, [k_proj], [v_proj], out, Sizes(n, g, D, 5), wide=1)
    return owned, weights, {"q": q, "o": o, "k": k, "v": v}


def gated_query(n: int = 4, g: int = 2):
    q, gate, k, v = parts_of(n), parts_of(n), parts_of(g), parts_of(g)
    out, o, o_weight = output(n)
    by_head = [[q[h], gate[h]] for h in range(n)]
    weights = {"q": pack(*by_head), "k": pack(k), "v": pack(v), "o": o_weight}
    q_proj, k_proj, v_proj = (linear(role, weights[role]) for role in "qkv")
    owned = packed_qkv.separate(q_proj, [k_proj], [v_proj], out, Sizes(n, g, D, D), wide=2)
    return owned, weights, {"q": q, "gate": gate, "o": o, "k": k, "v": v}


def packed(lay: str, n: int, g: int, class_name: str = "Attention", **stated):
    """One tensor of q, k and v, laid out by loops that know nothing of the table."""
    q, k, v = parts_of(n), parts_of(g), parts_of(g)
    if lay == "blocks":
        runs = [q, k, v]
    elif lay == "heads":
        runs = [[q[h], k[h], v[h]] for h in range(n)]
    elif lay == "groups":
        per = n // g
        runs = [[*q[i * per : (i + 1) * per], k[i], v[i]] for i in range(g)]
    else:
        quarters = [slice(b * n // 4, (b + 1) * n // 4) for b in range(4)]
        runs = [q[quarter] + v[quarter] + k[quarter] for quarter in quarters]
    out, o, o_weight = output(n)
    weights = {"qkv": pack(*runs), "o": o_weight}
    owned = packed_qkv.split_packed(candidate(class_name, num_heads=n, **stated), linear("qkv", weights["qkv"]), out)
    return owned, weights, {"q": q, "o": o, "k": k, "v": v}


def keys_then_values(n: int = 4, g: int = 2):
    q, k, v = parts_of(n), parts_of(g), parts_of(g)
    out, o, o_weight = output(n)
    weights = {"q": pack(q), "kv": pack(k, v), "o": o_weight}
    owned = packed_qkv.split_pair(linear("q", weights["q"]), linear("kv", weights["kv"]), out, Sizes(n, g, D, D))
    return owned, weights, {"q": q, "o": o, "k": k, "v": v}


def latent(n: int = 4, rope: int = 2, gated: bool = False):
    nope, size = 3, 5
    q, turned, gate, k, v = (parts_of(n, rows) for rows in (nope, rope, size * gated, nope, size))
    out, o, o_weight = output(n, size)
    weights = {
        "q_b": pack(*([q[h], turned[h], gate[h]] for h in range(n))),
        "kv_b": pack(*([k[h], v[h]] for h in range(n))),
        "o": o_weight,
    }
    at = candidate("LatentAttention", num_heads=n, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=size)
    owned = packed_qkv.split_latent(at, linear("q_b", weights["q_b"]), gated, linear("kv_b", weights["kv_b"]), out)
    want = {"q": q, "q_rope": turned, "gate": gate, "o": o, "k": k, "v": v}
    return owned, weights, {role: matrices for role, matrices in want.items() if matrices[0].numel()}


# name: (the line of the table that it reads, what makes its weights)
CASES = {
    "separate": ("one", separate_projections),
    "gated query": ("gated", gated_query),
    "blocks": ("blocks", lambda: packed("blocks", 4, 4)),
    "blocks, grouped queries": ("blocks", lambda: packed("blocks", 6, 2)),
    "blocks, one key/value head": ("blocks", lambda: packed("blocks", 4, 1, multi_query=True)),
    "keys, then values": ("blocks", keys_then_values),
    "heads": ("heads", lambda: packed("heads", 4, 4, multi_query=False)),
    "groups": ("groups", lambda: packed("groups", 6, 2, new_decoder_architecture=True)),
    "groups of one": ("groups", lambda: packed("groups", 4, 4, new_decoder_architecture=True)),
    "codegen": ("codegen", lambda: packed("codegen", 8, 8, "CodeGenAttention")),
    "latent": ("latent", latent),
    "latent without rotary rows": ("latent", lambda: latent(rope=0)),
    "latent with a gate": ("latent", lambda: latent(gated=True)),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_slices_cut_out_what_was_packed(case):
    owned, weights, want = CASES[case][1]()
    assert same(cut_out(owned, weights), want)


def test_every_line_of_the_table_has_a_case():
    assert {order for order, _ in CASES.values()} == set(ROWS)


def rearranged(order: str, weight: Tensor, **sizes: int) -> Tensor:
    """The weight itself, rearranged by the pattern that rearranges row numbers, its columns behind."""
    rows, by_head = ROWS[order].split(" -> ")
    return rearrange(weight, f"{rows} m -> {by_head} m", d=D, **sizes)


def stacked(*parts: list[Tensor]) -> Tensor:
    return torch.stack([torch.stack(part) for part in parts])


def test_the_patterns_rearrange_weights_too():
    q, k, v = parts_of(4), parts_of(4), parts_of(4)
    assert torch.equal(rearranged("one", pack(q)), torch.stack(q))
    assert torch.equal(rearranged("gated", pack(*([q[h], k[h]] for h in range(4))), two=2), stacked(q, k))
    assert torch.equal(rearranged("blocks", pack(q, k, v)), torch.stack(q + k + v))
    assert torch.equal(rearranged("heads", pack(*([q[h], k[h], v[h]] for h in range(4))), three=3), stacked(q, k, v))
    blocks = pack(*([q[h], v[h], k[h]] for h in range(4)))
    assert torch.equal(rearranged("codegen", blocks, block=4, three=3), stacked(q, v, k))
    groups = rearranged("groups", pack([q[0], q[1], k[0], v[0]], [q[2], q[3], k[1], v[1]]), group=2)
    assert torch.equal(groups, stacked([q[0], q[1], k[0], v[0]], [q[2], q[3], k[1], v[1]]))


@pytest.mark.parametrize("case", [case for case, (order, _) in CASES.items() if order in ("heads", "codegen")])
def test_slices_are_what_the_pattern_makes_of_the_weight(case):
    order, make = CASES[case]
    owned, weights, _ = make()
    n, found = len(owned.heads), cut_out(owned, weights)
    sizes = {"head": n} if order == "heads" else {"block": 4, "head": n // 4}
    by_part = rearranged(order, weights["qkv"], three=3, **sizes)
    assert torch.equal(by_part, stacked(*(found[role] for role in ("qkv" if order == "heads" else "qvk"))))


# A line of the table with two of its axes swapped, and what that reads wrongly.
SWAPPED = {
    "gated": "(two head d) -> two head d",
    "heads": "(three head d) -> three head d",
    "groups": "(member group d) -> group member d",
    "codegen": "(three block head d) -> three (block head) d",
    "latent": "(row head) -> head row",
}


@pytest.mark.parametrize("case", [case for case, (order, _) in CASES.items() if order in SWAPPED])
def test_swapped_axes_show(monkeypatch, case):
    order, make = CASES[case]
    monkeypatch.setitem(packed_qkv.ROWS, order, SWAPPED[order])
    try:
        owned, weights, want = make()
    except AssertionError as error:
        assert "do not follow each other" in str(error)
    else:
        assert not same(cut_out(owned, weights), want)


@pytest.mark.parametrize("parts", ["q, k, v", "v, q, k", "k, v, q"])
def test_another_order_of_parts_shows(monkeypatch, parts):
    plant(monkeypatch, packed_qkv, ("q, v, k = row_numbers(order, block=4", f"{parts} = row_numbers(order, block=4"))
    owned, weights, want = CASES["codegen"][1]()
    assert not same(cut_out(owned, weights), want)


@pytest.mark.parametrize("order", ["one", "blocks"])
def test_rows_of_a_head_that_do_not_follow_each_other_are_an_error(monkeypatch, order):
    axis = "head" if order == "one" else "member"
    monkeypatch.setitem(packed_qkv.ROWS, order, f"(d {axis}) -> {axis} d")
    make = next(make for used, make in CASES.values() if used == order)
    with pytest.raises(AssertionError, match="do not follow each other"):
        make()


def test_row_numbers_do_not_depend_on_the_default_device():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    with torch.device("meta"):
        layout = find_heads(Attention())
    found = [(p.role, p.start, p.stop) for p in layout.slices(0, 1) if not p.bias]
    assert found == [("q", 2, 4), ("o", 2, 4), ("k", 6, 8), ("v", 10, 12)]
    assert type(row_numbers("one", head=2, d=2)) is np.ndarray
