"""Ranges of rows and columns against sets of numbers, and the views that they cut out."""

import random

import pytest
import torch

from alps_kernels.tensors import as_matrix, blocks, complement, intersect, matrix_shape, merge


def members(ranges):
    return {i for start, stop in ranges for i in range(start, stop)}


@pytest.mark.parametrize("seed", range(20))
def test_merge_complement_and_intersect_are_those_of_sets(seed):
    draw = random.Random(seed)
    several = [[(a, a + draw.randint(0, 6)) for a in (draw.randint(0, 24) for _ in range(draw.randint(0, 6)))] for _ in "ab"]
    a, b = map(merge, several)
    assert [members(a), members(b)] == [members(ranges) for ranges in several]
    for ranges in (a, b, complement(a, 30), intersect(a, b)):  # sorted, apart, none empty
        assert all(start < stop for start, stop in ranges)
        assert all(one[1] < two[0] for one, two in zip(ranges, ranges[1:], strict=False))
    assert members(complement(a, 30)) == set(range(30)) - members(a)
    assert members(intersect(a, b)) == members(a) & members(b)


@pytest.mark.parametrize("shape, matrix", [((6, 4), (6, 4)), ((5,), (5, 1)), ((), (1, 1)), ((3, 2, 4), (3, 8)), ((0, 3), (0, 3))])
def test_the_matrix_is_a_view(shape, matrix):
    tensor = torch.zeros(shape)
    assert matrix_shape(tensor.shape) == matrix and as_matrix(tensor).shape == matrix
    assert as_matrix(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_are_views_along_the_dimension(dim):
    tensor = torch.arange(24.0).view(4, 6)
    for block, (start, stop) in zip(blocks(tensor, dim, ((0, 1), (2, 4))), ((0, 1), (2, 4)), strict=True):
        assert torch.equal(block, tensor[start:stop] if dim == 0 else tensor[:, start:stop])
        block.zero_()
    assert tensor.count_nonzero() == (6 if dim == 0 else 12)
