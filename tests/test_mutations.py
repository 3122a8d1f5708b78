"""The seeded faults: none is stale, and a few are tried at every run (`make mutations` tries all)."""

import pytest

from tests import mutations

QUICK = ("K is rounded down", "adjacent ranges are not merged", "carry between tiles is lost", "weight decay is lost")


def test_there_are_enough_and_every_kernel_has_some():
    assert len(mutations.FAULTS) >= 25 and len({f.name for f in mutations.FAULTS}) == len(mutations.FAULTS)
    assert {f.file for f in mutations.FAULTS} >= {"csrc_triton/numerics.py", "csrc_triton/head_adamw.py", "csrc_triton/head_delta.py"}


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda f: f.name)
def test_no_fault_is_stale(fault):
    assert mutations.applied(fault, mutations.ROOT)


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_turns_its_test_red(name):
    assert not mutations.survives(next(f for f in mutations.FAULTS if f.name == name))
