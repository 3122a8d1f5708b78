"""HeadAdamW keeps torch.optim.AdamW's contract, and moves the selected slices alone."""

import copy
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn

from alps_kernels.optim import HeadAdamW
from alps_kernels.selection import BoundParam

from .cases import assert_frozen, bind, fill_grads, formula, make, run, same_bytes, snapshot, toy

OPTIONS = [
    dict(),
    dict(amsgrad=True, weight_decay=0.1),
    dict(maximize=True),
    dict(betas=(0.0, 0.99), eps=1e-3),
    dict(betas=(0.4, 0.0), weight_decay=0.0),  # beta1 below one half: torch's lerp goes from the other end
    dict(lr=torch.tensor(3e-3), amsgrad=True),
    dict(capturable=True),
    dict(foreach=True),
    dict(fused=True),
]


def twins(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    ours = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7, bias=False), nn.LayerNorm(7)).to(dtype)
    return ours, copy.deepcopy(ours)


def steps(model, optimizer, n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        optimizer.zero_grad()
        x = torch.randn(8, 20, generator=generator).to(next(model.parameters()))
        (model(x) ** 2 * torch.arange(7.0).to(x)).mean().backward()
        optimizer.step()


def ulps(a, b):
    """The largest distance in float32 spacings of the larger magnitude."""
    spacing = torch.finfo(torch.float32).eps * torch.maximum(a.abs(), b.abs()).clamp_min(2.0**-126)
    return ((a - b).abs() / spacing).max().item() if a.numel() else 0.0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_parameters_equal_torch_over_50_steps(options):
    ours, theirs = twins()
    # capturable means nothing to torch on a CPU: compare with its plain path
    plain = {key: value for key, value in options.items() if key not in ("capturable", "foreach", "fused")}
    if isinstance(plain.get("lr"), torch.Tensor):  # we compute in float64 where torch stays in the tensor's float32
        plain["lr"] = plain["lr"].item()
    steps(ours, HeadAdamW(ours.parameters(), **options), 50)
    steps(theirs, torch.optim.AdamW(theirs.parameters(), **plain), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ulps(a.detach(), b.detach()) <= 2


def test_float64_parameters_keep_float64():
    ours, theirs = twins(dtype=torch.float64)
    steps(ours, optimizer := HeadAdamW(ours.parameters()), 20)
    steps(theirs, torch.optim.AdamW(theirs.parameters()), 20)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(state["exp_avg"].dtype == torch.float64 for state in optimizer.state.values())


def test_signature_is_torchs_and_ours_by_keyword():
    ours = inspect.signature(HeadAdamW).parameters
    theirs = inspect.signature(torch.optim.AdamW).parameters
    assert [(p.name, p.default, p.kind) for p in list(ours.values())[:len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs.values()]
    extra = list(ours.values())[len(theirs):]
    assert [p.name for p in extra] == ["heads", "master", "moment_dtype", "max_grad_norm", "seed"]
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@pytest.mark.fault("Bad input", "arguments that torch.optim.AdamW refuses: refused with its words")
@pytest.mark.parametrize("bad", [
    dict(lr=-1.0), dict(eps=-1e-8), dict(betas=(1.0, 0.9)), dict(betas=(0.9, -0.1)), dict(weight_decay=-0.1),
    dict(lr=torch.tensor([1e-3, 1e-3])), dict(fused=True, foreach=True), dict(fused=True, differentiable=True),
    dict(lr=torch.tensor(1e-3), foreach=True),
], ids=str)
def test_wrong_arguments_raise_what_torch_raises(bad):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch.optim.AdamW([nn.Parameter(torch.zeros(2))], **bad)
    with pytest.raises(theirs.type) as ours:
        HeadAdamW([nn.Parameter(torch.zeros(2))], **bad)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.fault("Bad input", "precisions, clipping and seeds that cannot be")
@pytest.mark.parametrize("bad, message", [
    (dict(master="triple"), "master is 'triple'"),
    (dict(moment_dtype=torch.float16), "moment_dtype is torch.float16"),
    (dict(moment_dtype=torch.uint8), "moment_dtype is torch.uint8; expected .* or '8bit'"),
    (dict(moment_dtype="8bit", amsgrad=True), "amsgrad has no 8-bit form"),
    (dict(max_grad_norm=0.0), "max_grad_norm is 0.0"),
    (dict(max_grad_norm=float("nan")), "max_grad_norm is nan"),
    (dict(seed=-1), "seed is -1"),
    (dict(seed=2**64), "seed is"),
    (dict(differentiable=True), "not differentiable"),
], ids=str)
def test_wrong_arguments_of_ours(bad, message):
    with pytest.raises(ValueError, match=message):
        HeadAdamW([nn.Parameter(torch.zeros(2))], **bad)


def test_parameters_that_do_not_train_here_are_refused_by_name():
    with pytest.raises(ValueError, match="parameter 0 of group 0 has dtype torch.complex64"):
        HeadAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="w has dtype torch.int64"):
        HeadAdamW([("w", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))])
    with pytest.raises(TypeError, match="heads is a list"):
        HeadAdamW([nn.Parameter(torch.zeros(2))], heads=[(0, 0)])
    params, bound = toy()
    with pytest.raises(ValueError, match="cols holds selected slices but is not among"):
        HeadAdamW([params["rows"], params["all"], params["bias"]], heads=bound)


@pytest.mark.fault("Frozen bytes", "NaN, infinite or large gradients outside the selection, in four dtypes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("outside", [float("nan"), float("inf"), 7.0])
def test_every_byte_outside_the_selection_stays(dtype, outside):
    params, bound = toy(dtype)
    params["cols"].data[3, 10] = float("nan")  # frozen NaNs keep their payload
    before = snapshot(params)
    optimizer = make(params, bound, amsgrad=True, max_grad_norm=1.0)
    run(params, optimizer, bound, 5, outside=outside)
    assert_frozen(params, before, bound)
    assert params["frozen"] not in optimizer.state and len(optimizer.state) == 4


def test_selected_slices_equal_torch_with_a_mask():
    params, bound = toy()
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
    optimizer, plain = make(params, bound), torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.1)
    for step in range(20):
        fill_grads(params, bound, torch.Generator().manual_seed(step))
        for name, param in theirs.items():
            param.grad = params[name].grad.nan_to_num(0.0)
        optimizer.step()
        plain.step()
    for part in bound.params:
        for mine, other in zip(part.blocks(params[part.name]), part.blocks(theirs[part.name]), strict=True):
            assert torch.equal(mine, other)


def test_float32_equals_the_formula_in_float64():
    params, bound = toy()
    start = snapshot(params)
    generator, grads = torch.Generator().manual_seed(1), []
    optimizer = make(params, bound)
    for _ in range(10):
        fill_grads(params, bound, generator)
        grads.append({name: p.grad.clone() for name, p in params.items()})
        optimizer.step()
    for name, want in formula(start, bound, grads).items():
        assert (params[name].detach().double() - want).abs().max() < 2e-6, name  # 10 roundings of numbers up to 4


def test_state_is_compact_and_of_the_own_shape_where_all_trains():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    for part in bound.params:
        state = optimizer.state[part.param]
        want = part.param.shape if part.full else (part.numel,)
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == want and state["exp_avg"].dtype == torch.float32
    elements = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert elements == bound.numel


def test_none_gradients_wait():
    params, bound = toy()
    optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    params["rows"].grad = None
    before = snapshot(params)
    optimizer.step()
    assert torch.equal(params["rows"], before["rows"]) and not torch.equal(params["all"], before["all"])
    assert optimizer.state[params["rows"]]["step"] == 1 and optimizer.state[params["all"]]["step"] == 2
    optimizer.zero_grad()
    assert optimizer.step() is None


def test_closure_gives_the_loss_under_grad():
    param = nn.Parameter(torch.ones(3))
    optimizer = HeadAdamW([param])

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0 and (param != 1).all()


def test_param_groups_schedulers_and_added_groups():
    a, b = twins()
    groups = [[dict(params=m[0].parameters(), lr=1e-2), dict(params=m[2].parameters(), betas=(0.5, 0.9), maximize=True)]
              for m in (a, b)]
    ours, theirs = HeadAdamW(groups[0], weight_decay=0.3), torch.optim.AdamW(groups[1], weight_decay=0.3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in (ours, theirs)]
    for i in range(10):
        if i == 4:
            for optimizer, model in ((ours, a), (theirs, b)):
                optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.1, "initial_lr": 0.1, "amsgrad": True})
            schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, theirs)]
        for optimizer, model, schedule in ((ours, a, schedules[0]), (theirs, b, schedules[1])):
            steps(model, optimizer, 1, seed=i)
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_an_added_group_is_frozen_under_a_selection_and_refused_whole():
    params, bound = toy()
    optimizer = make(params, bound)
    late = nn.Parameter(torch.ones(4))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(4)
    run(params, optimizer, bound, 2)
    assert (late == 1).all() and late not in optimizer.state
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="param group 2: master"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4))], "master": "no"})
    assert len(optimizer.param_groups) == groups


@pytest.mark.fault("All or nothing", "a sparse gradient or a spoiled state of the last parameter: nothing has moved")
@pytest.mark.parametrize("fault, error, message", [
    (lambda p: setattr(p["bias"], "grad", torch.zeros(48).to_sparse()), RuntimeError, "sparse gradients: that of bias"),
    (lambda p: optimizer_state(p).update(exp_avg=torch.zeros(3)), ValueError, "bias: its exp_avg is"),
    (lambda p: optimizer_state(p).update(exp_avg=torch.zeros(16).double()), ValueError, "16] torch.float64 on cpu, exp"),
    (lambda p: optimizer_state(p).pop("exp_avg_sq"), ValueError, "bias: its state has no exp_avg_sq"),
], ids=["sparse", "shape", "dtype", "missing"])
def test_a_fault_in_the_last_parameter_moves_none(fault, error, message):
    params, bound = toy()
    optimizer = params["bias"].optimizer = make(params, bound)
    run(params, optimizer, bound, 1)
    fill_grads(params, bound, torch.Generator().manual_seed(5))
    before, state = snapshot(params), copy.deepcopy(optimizer.state[params["all"]])
    fault(params)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(same_bytes(params[name], before[name]) for name in params)
    assert all(torch.equal(optimizer.state[params["all"]][key], state[key]) for key in state)


def optimizer_state(params):
    return params["bias"].optimizer.state[params["bias"]]


def test_a_sparse_gradient_of_a_frozen_parameter_is_nobodys_business():
    params, bound = toy()
    optimizer = make(params, bound)
    fill_grads(params, bound, torch.Generator())
    params["frozen"].grad = torch.zeros(48, 24).to_sparse()
    optimizer.step()


def test_empty_parameters_and_empty_selections():
    params, _ = toy()
    optimizer = HeadAdamW(list(params.values()), heads=bind())
    before = snapshot(params)
    for p in params.values():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(torch.equal(params[name], before[name]) for name in params) and not optimizer.state
    empty = nn.Parameter(torch.zeros(0, 4))
    scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = HeadAdamW([empty, scalar], max_grad_norm=1.0)
    empty.grad, scalar.grad = torch.zeros(0, 4), torch.tensor(1.0)
    optimizer.step()
    assert scalar < 2
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("make_weight", [
    lambda: torch.randn(24, 48).t(),  # columns of a transposed weight
    lambda: torch.randn(48, 32)[:, :24],  # rows with a stride
    lambda: torch.randn(48, 2, 3, 4),  # a convolution
], ids=["transposed", "strided", "4d"])
def test_weights_of_any_layout(make_weight):
    torch.manual_seed(0)
    weight = make_weight()
    param, other = nn.Parameter(weight), nn.Parameter(weight.clone())
    part = BoundParam("w", param, 0, ((4, 20),))
    ours, theirs = HeadAdamW([param], heads=bind(part)), torch.optim.AdamW([other])
    before = param.detach().clone()
    for _ in range(3):
        param.grad = other.grad = torch.randn(param.shape)
        ours.step()
        theirs.step()
    assert torch.equal(param[4:20], other[4:20])
    assert torch.equal(param[:4], before[:4]) and torch.equal(param[20:], before[20:])


def test_max_grad_norm_counts_the_selected_slices_alone():
    params, bound = toy()
    theirs = [nn.Parameter(part.cut(part.param.detach()).clone()) for part in bound.params]
    optimizer, plain = make(params, bound, max_grad_norm=0.5), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(5):
        fill_grads(params, bound, torch.Generator().manual_seed(step), outside=1e30)
        for part, cut in zip(bound.params, theirs, strict=True):
            cut.grad = part.cut(part.param.grad)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for part, cut in zip(bound.params, theirs, strict=True):
        assert (part.cut(part.param.detach()) - cut.detach()).abs().max() < 1e-6


def test_gradients_are_not_kept_alive():
    params, bound = toy()
    optimizer = make(params, bound)
    for found_inf in (0.0, 1.0):
        optimizer.found_inf = torch.tensor(found_inf)
        run(params, optimizer, bound, 2)
        grads = [weakref.ref(p.grad) for p in params.values()]
        optimizer.zero_grad()
        assert not any(grad() is not None for grad in grads)


def test_what_changes_between_steps_is_seen():
    """The arguments of a step are kept for the next one, but not what they no longer hold."""
    results = []
    for fresh in (False, True):  # the same run, with an optimizer that keeps nothing
        params, bound = toy()
        optimizer = make(params, bound)
        for step in range(6):
            optimizer._cache = None if fresh else optimizer._cache
            fill_grads(params, bound, torch.Generator().manual_seed(step))
            if step == 2:  # weights swapped for others elsewhere in memory, as model.to() and sharding do
                params["rows"].data = params["rows"].data.clone() * 2
            if step == 3:
                state = optimizer.state[params["all"]]
                state["exp_avg"] = state["exp_avg"].clone() * 3
            if step == 4:
                optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.9), maximize=True)
            optimizer.step()
            params["all"].grad.mul_(-1)
            optimizer.step()
        results.append(params)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    params["rows"].data = params["rows"].data.double()
    params["rows"].grad = torch.zeros(48, 24).double()
    with pytest.raises(ValueError, match="rows is torch.float64 and was torch.float32"):
        optimizer.step()


def test_copies_and_pickles_go_on_as_the_original():
    params, bound = toy(torch.bfloat16)
    optimizer = make(params, bound, max_grad_norm=1.0)
    run(params, optimizer, bound, 3)
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        clones, other = again((params, optimizer))
        run(clones, other, other.heads, 3, seed=9)
        assert other.max_grad_norm == 1.0 and other.heads.params[0].param is clones["rows"]
        start = copy.deepcopy((params, optimizer))
        run(start[0], start[1], start[1].heads, 3, seed=9)
        assert all(same_bytes(clones[name], start[0][name]) for name in params)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_training_step_steps(backend):
    torch._dynamo.reset()
    ours, theirs = twins()
    optimizer, plain = HeadAdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    x = torch.randn(8, 20)

    def train(model, optim):
        optim.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optim.step()
        return loss

    compiled = torch.compile(train, backend=backend)
    graphs = []
    for step in range(5):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 1e-2 / (step + 1)
        compiled(ours, optimizer)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.grad = a.grad.clone()  # the compiled backward's: it rounds as it likes
        plain.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1], "a step or a learning rate made it compile again"
    assert optimizer.state[ours[0].weight]["step"] == 5
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert ulps(a.detach(), b.detach()) <= 2


@pytest.mark.parametrize("rest", ["frozen", "trainable"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_heads_of_a_model_train_and_the_others_stay(family, rest):
    """Separate, fused transposed and fused projections, from the selection to the bytes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from alps_kernels.layout import find_heads
    from alps_kernels.selection import HeadSelection

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=48, vocab_size=61, pad_token_id=0)
    if family == "gpt2":
        sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=61)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).bfloat16()
    heads = HeadSelection.random(find_heads(model), 0.4, seed=1, parts=("q", "k", "v", "o"))
    bound = heads.freeze(model, rest=rest)
    optimizer = HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=bound)
    params = dict(model.named_parameters())
    before = snapshot(params)
    tokens = torch.randint(1, 61, (4, 16))
    losses = []
    for _ in range(10):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        for part in bound.params:  # what a fault in a frozen head would leave behind
            poison = torch.full_like(part.param, float("nan"))
            part.spread(part.cut(part.param.grad), poison)
            part.param.grad = poison
        optimizer.step()
        optimizer.zero_grad()
    assert_frozen(params, before, bound)
    assert losses[-1] < losses[0]
    assert sum(state["exp_avg"].numel() for state in optimizer.state.values()) == bound.numel
