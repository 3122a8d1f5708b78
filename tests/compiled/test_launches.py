"""A recorded launch compiles to the binary that the launch itself runs, and the gates follow the host's code."""

from unittest import mock

import pytest
import torch
from triton import knobs
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

from alps_kernels.ops.adamw import plan
from alps_kernels.ops.delta import projection

from ..support.launches import RUN, recorded, stand_in, target_of
from . import cases

CASES = {"step": lambda: cases.step_of(cases.SPLIT),
         "step without clipping": lambda: cases.step_of(cases.PLAIN, False, False),
         "score": cases.score_of, "projection": cases.projection_of}


def asked(target, launches, run):
    """What `run` asks Triton to compile for `target`, by kernel: types, alignment, constants and options.

    Triton's own hook sees it and lets nothing be compiled or launched.
    """
    seen = {}

    def note(key, fn, compile, **_):
        seen[fn.name.split(".")[-1]] = key, compile["num_warps"], compile["num_stages"], compile["enable_fp_fusion"]
        return True

    for launch in launches.values():
        launch.kernel.device_caches.pop(target, None)
    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with stand_in(target), mock.patch.object(projection, "is_hopper", lambda device: target == "sm_90"):
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
        for launch in launches.values():
            launch.kernel.device_caches.pop(target, None)
    return seen


def compile_all(target, launches, **options):
    for launch in launches.values():
        launch.with_options(**options).compile(target)


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_launch_asks_for_what_the_launch_asks_for(case):
    make, target = CASES[case], "sm_90"
    launches = cases.launches_of(make(), target)
    by_launch = asked(target, launches, make())
    assert by_launch.keys() == launches.keys()
    assert asked(target, launches, lambda: compile_all(target, launches)) == by_launch
    for other in ({"num_stages": 4}, {"num_warps": 16}, {"enable_fp_fusion": "step" in case}):
        planted = asked(target, launches, lambda: compile_all(target, launches, **other))
        assert all(planted[name] != by_launch[name] for name in launches), other


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_binary_has_the_options_of_its_launch(target):
    launch = cases.projection_launches(target)["group_products_kernel"]  # the others: test_head_projection.py
    for launches in (cases.step_launches(cases.SPLIT, target=target), cases.score_launches(target), {"": launch}):
        for each in launches.values():
            assert differences(each, each.compile(target), target) == []
    assert differences(launch, launch.with_options(num_stages=3).compile(target), target) == ["num_stages"]
    assert differences(launch, launch.with_options(num_warps=16).compile(target), target) == ["num_warps"]


def differences(launch, built, target):
    """The options in which a binary differs from what Triton makes of the launch's arguments."""
    names = set(launch.kernel.arg_names)
    backend = make_backend(target_of(target))
    wanted = backend.parse_options({k: v for k, v in launch.options.items() if k not in names})
    return [name for name in ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "arch")
            if getattr(built.metadata, name) != getattr(wanted, name)]


def test_gates_follow_the_host(monkeypatch):
    before = cases.launches_of(cases.step_of(cases.PLAIN), "sm_90")["head_adamw_kernel"].compile("sm_90")
    monkeypatch.setitem(plan.WARPS, True, 2 * plan.WARPS[True])
    after = cases.launches_of(cases.step_of(cases.PLAIN), "sm_90")["head_adamw_kernel"].compile("sm_90")
    assert after.metadata.num_warps == 2 * before.metadata.num_warps


def test_launches_are_made_again_after_a_recording_that_failed():
    with pytest.raises(ZeroDivisionError), recorded("gfx942"):
        1 / 0
    assert JITFunction.run is RUN and torch.version.hip is None
