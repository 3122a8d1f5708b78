"""What a step asks of the driver: copies, launches and waits, counted and held to their order on a stand-in."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from alps_kernels.ops.adamw.plan import RING, SPARES
from alps_kernels.optim import HeadAdamW
from alps_kernels.optim.first_steps import FIRST_STEPS
from alps_kernels.selection import BoundParam
from tests.support.fake_driver import driver

from .cases import bind, sliced_module

WARM = FIRST_STEPS + 2
STEP = ["copy", "launch head_adamw_kernel", "record"]


def many(n=6, steps=WARM, **options):
    """An optimizer of rows and columns that took some steps, and its parameters."""
    params = [nn.Parameter(torch.randn(32, 32).bfloat16()) for _ in range(n)]
    bound = bind(*(BoundParam(str(i), p, i % 2, ((8, 24),)) for i, p in enumerate(params)))
    optimizer = HeadAdamW(params, heads=bound, **options)
    move(params)
    for _ in range(steps):
        optimizer.step()
    return params, optimizer


def move(params):
    """Gradients at other addresses; those before stay where they are, so that none is met again."""
    move.kept += [p.grad for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    return [p.grad for p in params]


move.kept = []


class Operations(TorchDispatchMode):
    """Names of torch's operations that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) not in ("empty", "slice", "select", "view", "detach", "alias"):
            self.names.append(name)
        return function(*args, **kwargs or {})


def asked(log, params, optimizer, moved=True):
    """What a warm step asks of the driver, and what it computes with torch."""
    with Operations() as seen:
        optimizer.step()  # under this mode tensors count as others: one step that looks at everything
        seen.names.clear()
        log.events.clear()
        log.grads = move(params) if moved else [p.grad for p in params]
        seen.names.clear()
        optimizer.step()
    return log.names(), seen.names


@pytest.mark.parametrize("moved", [False, True], ids=["the same gradients", "gradients elsewhere"])
def test_a_step_is_a_copy_and_a_launch(moved):
    with driver() as log:
        events, seen = asked(log, *many(), moved)
    assert events == ["synchronize", *STEP]  # with the event of RING steps ago
    assert seen == ["copy_", "add_"], "the stand-in's own copy, and the step counts of the host"


def test_clipping_is_a_copy_two_launches_and_two_small_kernels():
    with driver() as log:
        events, seen = asked(log, *many(max_grad_norm=1.0))
    assert events == ["synchronize", "copy", "launch head_grad_norm_kernel", "record", *STEP[1:]]
    assert seen == ["copy_", "sum", "sqrt", "add_"]


def test_scaled_and_clipped_it_is_as_many():
    with driver() as log:
        params, optimizer = many(max_grad_norm=1.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        events, seen = asked(log, params, optimizer)
    assert events == ["synchronize", "copy", "launch head_grad_norm_kernel", "record", *STEP[1:]]
    assert seen == ["_local_scalar_dense", "copy_", "sum", "sqrt", "add_"], "found_inf is read where the host counts"


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["host counts", "device counts"])
def test_no_step_waits_for_the_one_before(options):
    """Where gradients move every step, a buffer is written again RING steps later."""
    with driver() as log:
        params, optimizer = many(**options)
        stages = []
        for _ in range(2 * RING):
            log.grads = move(params)
            optimizer.step()
            stages.append(optimizer._launches.current[0].stage)
    assert RING > 1 and len(set(map(id, stages[:RING]))) == RING and stages[:RING] == stages[RING:]


def test_the_device_counts_without_copies():
    with driver() as log:
        params, optimizer = many(capturable=True)
        events, seen = asked(log, params, optimizer, moved=False)
    assert events == STEP[1:] and len(seen) <= 27, seen
    assert optimizer.state[params[0]]["step"] == WARM + 2


def test_under_found_inf_the_device_counts_no_step():
    with driver() as log:
        params, optimizer = many(capturable=True)
        for found_inf in (1.0, 0.0):
            optimizer.found_inf = torch.tensor([found_inf])
            log.events.clear()
            optimizer.step()
            assert log.names() == STEP[1:] and optimizer.state[params[0]]["step"] == WARM + (found_inf == 0)


def test_a_graph_and_steps_beside_it_read_their_own_gradients():
    with driver() as log:
        params, optimizer = many(capturable=True)
        captured = move(params)
        with log.captured():
            optimizer.step()
        for _ in range(RING + 1):  # before the first replay, and over every buffer of the ring
            log.grads = move(params)
            optimizer.step()
            log.replay(captured)
        optimizer.set_heads(bind(*(BoundParam(str(i), p, i % 2, ((0, 8),)) for i, p in enumerate(params))))
        log.grads = move(params)
        optimizer.step()
        log.replay(captured)


def test_a_graph_with_clipping_copies_once_and_a_second_graph_has_tables_of_its_own():
    with driver() as log:
        params, optimizer = many(capturable=True, max_grad_norm=1.0)
        graphs = []
        for _ in range(2):
            grads = move(params)
            with log.captured():
                optimizer.step()
            graphs.append((grads, log.graph))
        assert [entry[0] for entry in graphs[0][1]] == ["copy", "launch", "launch"]
        for grads, log.graph in graphs * 2:
            log.replay(grads)


def test_a_capture_before_any_step_is_refused_and_leaves_no_trace():
    with driver() as log:
        params, optimizer = many(steps=0, capturable=True)
        with log.captured(), pytest.raises(RuntimeError, match="never ran outside of a capture.*take one step"):
            optimizer.step()
        assert not any(optimizer.state.values())
        optimizer.step()
        with log.captured():
            optimizer.step()


def test_captures_end_where_prepared_memory_does():
    with driver() as log:
        params, optimizer = many(capturable=True)
        for _ in range(SPARES):
            with log.captured():
                optimizer.step()
        with log.captured(), pytest.raises(RuntimeError, match=f"was captured in a CUDA graph {SPARES} times"):
            optimizer.step()
        optimizer.step()
        with log.captured():
            optimizer.step()


def test_a_capture_of_gradients_that_need_another_launch_is_refused():
    """Off by two bytes, they cannot be read 16 bytes at a time: tables of another launch cannot be made in a capture."""
    with driver() as log:
        params, optimizer = many(capturable=True)
        memory = torch.ones(32 * 32 + 1, dtype=torch.bfloat16)
        params[0].grad = memory[1:].view(32, 32)
        with log.captured(), pytest.raises(RuntimeError, match="with parameters and gradients like these"):
            optimizer.step()


def test_a_capture_with_other_parameters_is_refused_and_the_counts_stay():
    with driver() as log:
        params, optimizer = many(capturable=True)
        params[0].grad = None
        with log.captured(), pytest.raises(RuntimeError, match="with parameters and gradients like these"):
            optimizer.step()
        assert all(state["step"] == WARM for state in optimizer.state.values())
        optimizer.step()
        with log.captured():
            optimizer.step()


def test_what_a_graph_reads_stays_where_it_is():
    """Counts are never moved by steps beside it, of fewer parameters or with other numbers."""
    with driver() as log:
        params, optimizer = many(capturable=True)
        steps = [(p, optimizer.state[p]["step"], optimizer.state[p]["step"].data_ptr()) for p in params]
        with log.captured():
            optimizer.step()
        for missing in (params[0], None, params[-1], None):
            move(params)
            if missing is not None:
                missing.grad = None
            optimizer.param_groups[0]["betas"] = (0.5, 0.6) if missing is not None else (0.8, 0.9)
            optimizer.step()
        assert all(optimizer.state[p]["step"] is step and step.data_ptr() == at for p, step, at in steps)
        assert [optimizer.state[p]["step"].item() for p in params] == [WARM + 1 + 3, *[WARM + 1 + 4] * 4, WARM + 1 + 3]


def test_numbers_made_in_a_capture_are_not_those_of_a_step_beside_it():
    """What a capture computes is there after a replay; a step that found it would read what nobody wrote."""
    with driver() as log:
        params, optimizer = many(capturable=True)
        optimizer.param_groups[0]["lr"] = 0.5
        with log.captured():
            optimizer.step()
            held = optimizer._launches.current[0].hypers
        optimizer.step()
        now = optimizer._launches.current[0].hypers
        assert now is not held and now[0, 5] == pytest.approx(1e-8)


def test_an_interrupted_copy_is_made_again():
    with driver() as log:
        params, optimizer = many(capturable=True)
        log.grads, send = move(params), log.send
        log.fails = True

        def fails(pinned, there):
            if log.fails:
                raise KeyboardInterrupt
            send(pinned, there)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("alps_kernels.ops.adamw.launch.send", fails)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            log.fails = False
            optimizer.step()


def test_hooks_of_every_optimizer_are_called_without_torchs_wrapper():
    """torch.profiler, which transformers imports, leaves one behind."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    called = []
    handle = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: called.append(optimizer))
    try:
        with driver() as log:
            events, seen = asked(log, *(made := many()))
    finally:
        handle.remove()
    assert called == [made[1]] * (WARM + 2) and "_record_function_enter_new" not in seen


def test_two_optimizers_in_turn_stay_warm():
    with driver():
        (_, a), (_, b) = many(), many()
        for _ in range(2):
            a.step()
            b.step()
        caches = a._cache, b._cache
        for _ in range(3):
            a.step()
            b.step()
        assert (a._cache, b._cache) == caches


def test_another_seed_between_warm_steps():
    with driver():
        params, optimizer = many()
        optimizer.seed = 7
        optimizer.step()
        assert optimizer._launches.current[0].pointers[11] == 7


def test_a_capture_of_a_step_that_looks_at_everything_counts_where_steps_beside_it_do():
    """As steps on shards do, and those after a state was replaced: a count made in a capture would hold nothing yet."""
    with driver() as log:
        params, optimizer = many(capturable=True)
        counts = optimizer._cache.device_hypers[0].counts
        optimizer._cache = None
        with log.captured():
            optimizer.step()
        assert optimizer._cache.device_hypers[0].counts is counts


def test_another_stream_waits_and_keeps_the_tables():
    with driver() as log:
        params, optimizer = many()
        plan = optimizer._launches.current[0]
        log.events.clear()
        with log.on_stream(7):
            optimizer.step()
        assert log.names() == ["keep", "synchronize", "wait", "copy", "keep", "launch head_adamw_kernel", "record"]
        assert [about for name, about in log.events if name == "keep"][0] is plan.parts[0].tiles
        kept = [about.data_ptr() for name, about in log.events if name == "keep"]
        assert plan.stage.there.data_ptr() in kept
        log.events.clear()
        for _ in range(RING):  # back again: the buffer that the other stream read waits for it
            optimizer.step()
        assert log.count()["wait"] == 1 and log.count()["keep"] == 0


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"max_grad_norm": 1.0}], ids=str)
def test_weights_count_the_writes(options):
    """So that autograd sees that what it saved has changed."""
    with driver():
        params, optimizer = many(**options)
        before = [p._version for p in params]
        loss = params[0].square().sum()
        optimizer.step()
        assert [p._version for p in params] == [version + 1 for version in before]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_full_weight_of_a_slice_counts_them_too():
    with driver():
        module = sliced_module(torch.randn(32, 32), 0, ((8, 24),))
        leaf, before = module.weight_slice, module.weight._version
        optimizer = HeadAdamW([leaf])
        leaf.grad = torch.ones_like(leaf)
        optimizer.step()
        assert module.weight._version == before + 1 and not module.synced.stale(module.weight, leaf)


def test_an_error_between_launches_leaves_the_next_step_whole(monkeypatch):
    with driver() as log:
        params, optimizer = many(max_grad_norm=1.0)
        launch = log.launch

        def fails(name, *rest):
            if name == "head_adamw_kernel":
                raise KeyboardInterrupt
            launch(name, *rest)

        log.launch = fails
        log.grads = move(params)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        log.launch = launch
        log.events.clear()
        log.grads = move(params)
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == WARM + 1 and log.count()["copy"] == 1
