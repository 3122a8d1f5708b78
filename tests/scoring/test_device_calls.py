"""What scoring asks of a device: launches, copies and waits, counted on tensors that are nowhere."""

import pytest
import torch

from alps_kernels.ops import Segment, head_delta_projection
from tests.scoring.host_time import METRIC_LISTS, asked, head_delta, layers_of, public_of


@pytest.mark.parametrize("metrics", METRIC_LISTS.values(), ids=METRIC_LISTS)
def test_scoring_stored_weights_is_three_kernels_one_upload_and_one_wait(metrics):
    found = asked(lambda: head_delta(layers_of(32, "meta"), metrics, backend="triton"))
    # beside the kernels the fill and the sum of what they leave
    assert found == {"kernels": 3, "launches": 2, "uploads": 1, "downloads": 1, "waits": 1}


@pytest.mark.parametrize("metrics", METRIC_LISTS.values(), ids=METRIC_LISTS)
def test_the_public_function_asks_for_nothing_more(metrics):
    found = asked(public_of(3, representation="qkv", metric=metrics))
    assert found == asked(lambda: head_delta(layers_of(3, "meta"), metrics, backend="triton"))


@pytest.mark.parametrize("metrics", METRIC_LISTS.values(), ids=METRIC_LISTS)
def test_scoring_products_is_four_kernels_one_upload_and_one_wait(metrics):
    found = asked(lambda: head_delta_projection(layers_of(32, "meta"), metrics, backend="triton"))
    assert found == {"kernels": 4, "launches": 2, "uploads": 1, "downloads": 1, "waits": 1}


def test_matrices_that_are_not_contiguous_are_copied_on_the_device():
    layers = [tuple(Segment(*(side.mT.contiguous().mT for side in (s.base, s.task)), s.index) for s in layer)
              for layer in layers_of(2, "meta")]
    found = asked(lambda: head_delta_projection(layers, ["pad"], backend="triton"))
    assert found == {"kernels": 4, "launches": 2 + 2 * 6, "uploads": 1, "downloads": 1, "waits": 1}


def test_a_wait_that_nothing_needs_is_counted():
    weight = torch.empty(4, 4, device="meta")

    def call():
        weight.isfinite().all().item()
        weight.cpu()
        weight.nonzero()
        torch.empty_like(weight).copy_(torch.zeros(4, 4))
        weight[:2].t().detach()

    found = asked(call)
    assert {name: n for name, n in found.items() if name != "launches"} == {
        "kernels": 0, "uploads": 1, "downloads": 1, "waits": 3}
    assert found["launches"] >= 2
