"""A synced knows when its weight may lag behind the leaf, and who is told of which parameter."""

import copy
import gc
import pickle

import torch
from torch import nn

from alps_kernels.tensors import LEAF_SUFFIX, SyncedSlice, leaf_of, sync_weights, synced_slice_of, synced_slices_in

ROWS = ((0, 2), (5, 6))


class Held(nn.Linear):
    """A linear layer with a leaf, as a sliced projection holds it; its forward copies nothing."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self._synced["weight"].adopt()


def held(dim=0, ranges=ROWS):
    module = Held(6, 8, bias=False).requires_grad_(False)
    synced = SyncedSlice(module, "weight", dim, ranges, True)
    module.register_parameter("weight" + LEAF_SUFFIX, nn.Parameter(synced.cut(module.weight)))
    module._synced = {"weight": synced}
    synced.adopt()
    synced.copy(module.weight, module.weight_slice)
    return module, synced


def agree(synced):
    return torch.equal(synced.cut(synced.weight), synced.leaf)


def test_leaf_and_weight_find_each_other_and_nothing_else_does():
    module, synced = held()
    assert synced_slice_of(module.weight_slice) is synced and leaf_of(module.weight) is module.weight_slice
    assert synced_slice_of(module.weight) is None and leaf_of(module.weight_slice) is None
    assert synced_slice_of(nn.Parameter(torch.zeros(1))) is None
    assert [(name, m) for name, m in synced_slices_in(nn.ModuleDict({"a": module}))] == [("a.weight", synced)]


def test_the_tables_keep_nothing_alive():
    from alps_kernels.tensors import synced_slices

    module, synced = held()
    keys = id(module.weight_slice), id(module.weight)
    assert keys[0] in synced_slices._BY_LEAF and keys[1] in synced_slices._BY_WEIGHT
    del module, synced
    gc.collect()
    assert keys[0] not in synced_slices._BY_LEAF and keys[1] not in synced_slices._BY_WEIGHT


def test_a_step_of_any_optimizer_reaches_the_weight_and_nothing_around_it():
    for dim, ranges in ((0, ROWS), (1, ((1, 3), (4, 5)))):
        module, synced = held(dim, ranges)
        before = module.weight.clone()
        module.weight_slice.grad = torch.randn_like(module.weight_slice)
        torch.optim.SGD([module.weight_slice], lr=1.0).step()
        assert agree(synced) and not torch.equal(module.weight, before)
        for block in synced.blocks(before):
            block.fill_(0)
        kept = module.weight.clone()
        for block in synced.blocks(kept):
            block.fill_(0)
        assert torch.equal(kept, before)


def test_an_unseen_step_shows_by_its_gradient():
    module, synced = held()
    module.weight_slice.data += 1.0
    assert not synced.stale(module.weight, module.weight_slice)  # nothing speaks of it
    synced.formed = True
    sync_weights(module)
    assert agree(synced)


class Unseen(torch.optim.Optimizer):
    """Steps without a trace: no version, no pointer changes."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for param in self.param_groups[0]["params"]:
            param.data += 1.0


def test_after_an_unseen_step_the_gradient_tells():
    module, synced = held()
    leaf = module.weight_slice
    leaf.grad = torch.zeros_like(leaf)
    optimizer = Unseen([leaf])
    optimizer.step()
    assert agree(synced), "whoever steps unseen has left a gradient behind"
    leaf.grad = None
    optimizer.step()
    assert not agree(synced)


def test_only_plain_tensors_of_one_dtype_and_device_are_written_through():
    module, synced = held()
    assert synced.writable(module.weight_slice)
    assert not synced.writable(nn.Parameter(module.weight_slice.detach().clone()))
    module.weight_slice.data = module.weight_slice.data.double()
    assert not synced.writable(module.weight_slice)


def test_a_graph_that_saved_the_weight_stays_usable_where_only_a_gradient_was_formed():
    module, synced = held()
    version = module.weight._version
    synced.formed = True
    synced.refresh(module.weight, module.weight_slice)
    assert module.weight._version == version
    with torch.no_grad():
        module.weight_slice.add_(1.0)
    synced.refresh(module.weight, module.weight_slice)
    assert module.weight._version > version and agree(synced)


def test_copies_have_synced_of_their_own():
    module, _ = held()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        theirs = synced_slice_of(other.weight_slice)
        assert theirs is other._synced["weight"] and theirs.module is other
        other.weight_slice.data.fill_(7.0)
        sync_weights(other)
        assert agree(theirs) and not (module.weight == 7.0).any()
