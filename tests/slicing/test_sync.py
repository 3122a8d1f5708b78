"""The weight a forward uses is the current one, whoever changed the leaf; and nothing is copied where nobody did."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import alps_kernels as alps
from alps_kernels.tensors import synced_slices, synced_slices_in
from tests.optim.cases import sliced_module

from .cases import batch, cut_grads, grads, loss_of, pair


class Counts(TorchDispatchMode):
    """How often each op ran, and the bytes that copies wrote."""

    def __init__(self):
        super().__init__()
        self.ops, self.copied = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.ops[name] = self.ops.get(name, 0) + 1
        if name == "copy_":
            self.copied += args[0].nbytes
        elif name == "_foreach_copy_":
            self.copied += sum(tensor.nbytes for tensor in args[0])
        return func(*args, **(kwargs or {}))


def counted(call):
    with Counts() as counts:
        call()
    return counts


def formed(sliced, seed=0):
    sliced.zero_grad()
    loss_of(sliced, seed).backward()


def as_if_fresh(sliced):
    """The loss of a plain model with the leaves written into it by hand."""
    plain = copy.deepcopy(sliced)
    with torch.no_grad():
        for _, synced in synced_slices_in(plain):
            for block, part in synced.pairs(synced.weight, synced.leaf):
                block.copy_(part)
    alps.unslice_heads(plain)
    return loss_of(plain, 5)


def by_hand(sliced, bound):
    formed(sliced)
    for part in bound.params:
        part.param.data -= 0.5 * part.param.grad


def by_hand_then_zeroed(sliced, bound):
    by_hand(sliced, bound)
    sliced.zero_grad(set_to_none=True)


def averaged_for_evaluation(sliced, bound):
    stepped_with(lambda p: torch.optim.AdamW(p, 0.05))(sliced, bound)
    loss_of(sliced)
    for part in bound.params:
        part.param.data.mul_(0.9)
    torch.set_grad_enabled(False)


def clamped_after_a_step(sliced, bound):
    stepped_with(lambda p: torch.optim.AdamW(p, 0.05))(sliced, bound)
    for part in bound.params:
        part.param.data.clamp_(-0.01, 0.01)


def in_place(sliced, bound):
    with torch.no_grad():
        for part in bound.params:
            part.param.add_(0.1)


def new_storage(sliced, bound):
    for part in bound.params:
        part.param.data = part.param.data + 0.1


def replaced(sliced, bound):
    for _, synced in synced_slices_in(sliced):
        leaf = synced.name + synced_slices.LEAF_SUFFIX
        setattr(synced.module, leaf, nn.Parameter(getattr(synced.module, leaf).detach() + 0.1))


def weight_replaced(sliced, bound):
    for _, synced in synced_slices_in(sliced):
        setattr(synced.module, synced.name, nn.Parameter(torch.zeros_like(synced.weight) + synced.weight * 1.5,
                                                         requires_grad=False))


def weight_moved(sliced, bound):
    for _, synced in synced_slices_in(sliced):
        synced.weight.data = torch.full_like(synced.weight, 0.3)


def after_autograd_grad(sliced, bound):
    found = torch.autograd.grad(loss_of(sliced), [part.param for part in bound.params])
    for part, grad in zip(bound.params, found, strict=True):
        part.param.data -= 0.5 * grad


def stepped_with(make):
    def change(sliced, bound):
        formed(sliced)
        make([part.param for part in bound.params]).step()

    return change


class Raw(torch.optim.Optimizer):
    """Writes through a data pointer, as a kernel of somebody's own does: no version, no gradient needed."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for param in self.param_groups[0]["params"]:
            values = param.detach().numpy()
            values -= 0.5 * param.grad.numpy()


CHANGES = {change.__name__: change for change in (
    by_hand, by_hand_then_zeroed, clamped_after_a_step, averaged_for_evaluation, in_place, new_storage, replaced, weight_replaced, weight_moved, after_autograd_grad)}
CHANGES |= {
    "SGD": stepped_with(lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)),
    "SGD foreach": stepped_with(lambda p: torch.optim.SGD(p, 0.5, foreach=True)),
    "AdamW": stepped_with(lambda p: torch.optim.AdamW(p, 0.05)),
    "AdamW fused": stepped_with(lambda p: torch.optim.AdamW(p, 0.05, fused=True)),
    "AdamW foreach": stepped_with(lambda p: torch.optim.AdamW(p, 0.05, foreach=True)),
    "Adafactor": stepped_with(lambda p: torch.optim.Adafactor(p, 0.05)),
    "LBFGS-like raw": stepped_with(Raw),
    "HeadAdamW": stepped_with(lambda p: alps.HeadAdamW(p, 0.05)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt2"])
def test_the_next_forward_sees_every_change(model_type, change):
    _, _, sliced, bound = pair(model_type)
    before = loss_of(sliced, 5).item()
    with torch.enable_grad():  # a change may switch it off; it comes back
        CHANGES[change](sliced, bound)
        got, want = loss_of(sliced, 5), as_if_fresh(sliced)
    assert torch.equal(got, want) and want.item() != before


def test_changes_one_after_another():
    _, _, sliced, bound = pair()
    for change in ("in_place", "new_storage", "weight_moved", "SGD", "replaced", "in_place", "weight_replaced", "in_place"):
        CHANGES[change](sliced, bound)
        before = loss_of(sliced, 5)
        assert torch.equal(before, as_if_fresh(sliced)), change
        in_place(sliced, bound)
        assert torch.equal(loss_of(sliced, 5), as_if_fresh(sliced)), change


@pytest.mark.parametrize("change", ["by_hand", "SGD", "AdamW fused", "HeadAdamW"])
def test_readers_that_do_not_run_the_model_see_it_too(change):
    _, heads, sliced, bound = pair()
    layout, start = alps.find_heads(sliced), copy.deepcopy(sliced)
    alps.unslice_heads(start)
    CHANGES[change](sliced, bound)
    scores = alps.score_heads(start, sliced, representation="qkv", metric="euclidean")
    moved = {head for head in layout if scores[head] > 0}
    assert set(heads) <= moved and moved <= {h for h in layout if h[0] in {layer for layer, _ in heads}}
    for name, value in sliced.state_dict().items():
        part = {p.name: p for p in heads.bind(start).params}.get(name)
        assert part is None or not torch.equal(part.cut(value), part.cut(start.state_dict()[name]))


def test_nothing_is_copied_where_nothing_changed():
    plain, heads, sliced, bound = pair()
    for _, synced in synced_slices_in(sliced):
        assert torch.equal(synced.cut(synced.weight), synced.leaf)
    inputs = batch(sliced)
    plain.requires_grad_(False)
    with torch.no_grad():
        frozen, ours = counted(lambda: plain(**inputs)), counted(lambda: sliced(**inputs))
    assert ours.ops == frozen.ops
    sliced(**inputs)  # the grad mode changed: it copies once
    train = counted(lambda: sliced(**inputs))
    for op in ("mm", "addmm", "bmm", "linear", "matmul"):
        assert train.ops.get(op, 0) == frozen.ops.get(op, 0), op
    assert train.copied == frozen.copied
    formed(sliced)
    optimizer = torch.optim.AdamW([part.param for part in bound.params], 0.01)
    slices = sum(synced.leaf.nbytes for _, synced in synced_slices_in(sliced))
    optimizer.step()
    assert counted(optimizer.step).copied == slices
    assert counted(lambda: sliced(**inputs)).copied - frozen.copied == slices
    assert counted(lambda: sliced(**inputs)).copied == frozen.copied
    formed(sliced)
    writes_both = alps.HeadAdamW(sliced.parameters(), heads=bound)
    writes_both.step()
    assert counted(lambda: sliced(**inputs)).copied == frozen.copied
    in_place(sliced, bound)
    assert counted(lambda: sliced(**inputs)).copied - frozen.copied == slices
    assert heads


def test_backward_multiplies_only_for_the_slices():
    plain, _, sliced, bound = pair(parts=("q", "k", "v"))
    loss = loss_of(sliced)
    counts = counted(loss.backward)
    frozen_loss = loss_of(plain.requires_grad_(False), 0)
    assert not frozen_loss.requires_grad
    plain.model.embed_tokens.requires_grad_(True)  # the chain alone: dX of every projection
    chain = counted(loss_of(plain).backward)
    assert counts.ops["mm"] <= chain.ops["mm"] + len(bound.params)


def test_a_graph_of_the_weights_before_a_step_is_refused_as_torch_does():
    _, _, sliced, bound = pair(parts=("q",))
    loss = loss_of(sliced)
    loss.backward(retain_graph=True)
    torch.optim.SGD([part.param for part in bound.params], 0.5).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_interleaved_micro_batches_are_no_such_case():
    plain, heads, sliced, bound = pair(dtype=torch.float64)
    first, second = loss_of(sliced, 0), loss_of(sliced, 1)
    first.backward()
    third = loss_of(sliced, 2)  # a gradient was formed: this copies, and the second graph stays whole
    second.backward()
    third.backward()
    for seed in range(3):
        loss_of(plain, seed).backward()
    got = grads(bound)
    for name, want in cut_grads(plain, heads).items():
        torch.testing.assert_close(got[name], want)


def test_a_weight_that_is_filled_anew_is_current_in_backward_too():
    """As FSDP2 does: other parameter objects in forward, their storage refilled with the sharded, old values."""
    plain, heads, sliced, bound = pair(dtype=torch.float64)
    in_place(sliced, bound)
    old = {name: synced.weight.detach().clone() for name, synced in synced_slices_in(sliced)}
    weight_replaced(sliced, bound)
    stand_ins = dict(synced_slices_in(sliced))
    for name, synced in stand_ins.items():
        synced.weight.data.copy_(old[name])
    with torch.no_grad():
        first = loss_of(sliced)
        for name, synced in stand_ins.items():
            synced.weight.data.copy_(old[name])
        assert torch.equal(first, loss_of(sliced))
    loss = loss_of(sliced)
    for name, synced in stand_ins.items():
        with torch.autograd._unsafe_preserve_version_counter(synced.weight):
            synced.weight.data.copy_(old[name])
    loss.backward()
    full = heads.bind(plain)
    with torch.no_grad():
        for part in full.params:
            part.spread(part.cut(part.param) + 0.1, part.param)
    loss_of(plain).backward()
    got = grads(bound)
    for name, want in cut_grads(plain, heads).items():
        torch.testing.assert_close(got[name], want)


def test_functional_call_uses_what_it_is_given_and_leaves_the_model_alone():
    _, _, sliced, bound = pair()
    before = loss_of(sliced, 5)
    leaves = {part.name: (part.param.detach() + 0.1).requires_grad_() for part in bound.params}
    out = torch.func.functional_call(sliced, leaves, (), batch(sliced, 5)).loss
    out.backward()
    assert all(leaf.grad is not None for leaf in leaves.values()) and not torch.equal(out, before)
    assert torch.equal(loss_of(sliced, 5), before)
    with torch.no_grad():
        out = torch.func.functional_call(sliced, leaves, (), batch(sliced, 5)).loss
        again = loss_of(sliced, 5)
    assert not torch.equal(out, before) and torch.equal(again, before)


def test_what_is_written_into_the_weight_alone_does_not_count():
    """The leaf is the truth: a selected slice of the full weight that someone overwrites comes back."""
    _, _, sliced, _ = pair()
    before = loss_of(sliced, 5)
    with torch.no_grad():
        for _, synced in synced_slices_in(sliced):
            for block in synced.blocks(synced.weight):
                block.zero_()
    assert torch.equal(loss_of(sliced, 5), before)


def test_the_weight_follows_what_is_done_to_the_leaf_around_our_step():
    """A hook that clamps, a subclass that edits, a step that moves nothing after an edit by hand."""
    class Clamps(alps.HeadAdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            edit(self)
            return loss

    def edit(optimizer, *_):
        for param in optimizer.param_groups[0]["params"]:
            param.data.clamp_(-0.01, 0.01)

    for case in ("hook", "subclass", "no gradients"):
        module = sliced_module(torch.randn(16, 8), 0, ((2, 6),))
        leaf = module.weight_slice
        optimizer = (Clamps if case == "subclass" else alps.HeadAdamW)([leaf], lr=0.1)
        if case == "hook":
            optimizer.register_step_post_hook(edit)
        for _ in range(3):
            leaf.grad = torch.ones_like(leaf)
            optimizer.step()
        if case == "no gradients":
            leaf.grad = None
            with torch.no_grad():
                leaf.fill_(0.5)
            optimizer.step()
        assert torch.equal(module.synced.cut(module.weight), leaf), case
