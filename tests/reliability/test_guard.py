"""`alps.guard` sees every byte that moves outside the selection, says where, and sees none that moves inside."""

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.selection import BoundSelection, frozen_guard as guarding
from alps_kernels.tensors import as_matrix, matrix_shape
from tests.support.mutants import plant

from .models import FAMILIES, optimizer_of, some_heads, tiny, train

pytestmark = pytest.mark.fault("The guard")


def outside(bound, params):
    """For every parameter, True where nothing trains."""
    frozen = {name: torch.ones(as_matrix(p).shape, dtype=torch.bool) for name, p in params.items()}
    for part in bound.params:
        for start, stop in part.ranges:
            frozen[part.name].narrow(part.dim, start, stop - start).fill_(False)
    return frozen


def flip(matrix, row, column, bit):
    """Flip one bit of one element in place."""
    if matrix.is_complex():
        matrix = torch.view_as_real(matrix)[..., 0]
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = matrix.detach().view(kinds[matrix.element_size()])
    bits = 8 * matrix.element_size()
    mask = 1 << bit % bits if bit % bits < bits - 1 or bits == 8 else -(1 << bits - 1)
    whole[row, column] ^= mask


@pytest.mark.parametrize("rest", ["frozen", "trainable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_flipped_bit(family, dtype, rest):
    """one flipped bit, in every tensor with a frozen part, at random places: named with its row"""
    model = tiny(family, dtype)
    bound = some_heads(model).bind(model, rest=rest)
    guard = alps.guard(model, bound)
    params = dict(model.named_parameters())
    draw = torch.Generator().manual_seed(3)
    for name, frozen in outside(bound, params).items():
        places = frozen.nonzero()
        for i in torch.randint(len(places), (2,), generator=draw).tolist() if len(places) else ():
            row, column = places[i].tolist()
            bit = int(torch.randint(64, (), generator=draw))
            flip(as_matrix(params[name].data), row, column, bit)
            change, = guard.changes()
            assert change.name == name and any(a <= row < b for a, b in change.rows)
            assert not change.columns or any(a <= column < b for a, b in change.columns)
            assert sum(b - a for a, b in change.rows) == 1
            flip(as_matrix(params[name].data), row, column, bit)
    assert guard.changes() == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fault", ["rows", "columns", "byte", "signs", "negated"])
def test_bytes_that_change_places(fault, dtype):
    """two rows or two columns swapped, a byte moved to another element, signs flipped in pairs, a row negated"""
    model = tiny(dtype=dtype)
    guard = alps.guard(model, some_heads(model))
    weight = model.model.layers[0].mlp.up_proj.weight.data
    before = weight.clone()
    if fault == "rows":
        weight[[4, 9]] = weight[[9, 4]]
    elif fault == "columns":
        weight[:, [4, 9]] = weight[:, [9, 4]]
    elif fault == "byte":
        raw = weight.view(torch.uint8)
        one, other = dtype.itemsize - 2, 3 * dtype.itemsize - 2
        assert raw[3, one] != raw[3, other]
        raw[3, one], raw[3, other] = raw[3, other].clone(), raw[3, one].clone()
    elif fault == "signs":
        weight[5, [2, 11]] *= -1
    else:
        weight[5] *= -1
    rows = {"rows": ((4, 5), (9, 10)), "columns": ((0, len(weight)),), "byte": ((3, 4),)}.get(fault, ((5, 6),))
    change, = guard.changes()
    assert change.name == "model.layers.0.mlp.up_proj.weight" and change.rows == rows
    assert (change.columns == ((4, 5), (9, 10))) == (fault == "columns" and dtype.itemsize >= 4)
    weight.copy_(before)
    guard.check()


@pytest.mark.parametrize("rest", ["frozen", "trainable"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_change_inside_is_not_seen(family, rest):
    """every selected byte overwritten: no alarm"""
    model = tiny(family)
    bound = some_heads(model).bind(model, rest=rest)
    with alps.guard(model, bound) as guard:
        for part in bound.params:
            for block in part.blocks(part.param.data):
                block.fill_(float("nan"))
    inside = sum(part.numel for part in bound.params)
    held = [*model.parameters(), *model.buffers()]
    assert guard.numel == sum(t.numel() for t in held) - inside > 0


class Odd(nn.Module):
    """One frozen tensor, held as a buffer."""

    def __init__(self, tensor):
        super().__init__()
        self.register_buffer("odd", tensor)


@pytest.mark.parametrize("make", [
    lambda: torch.randn(24, 48).t(), lambda: torch.randn(48, 33)[:, 1:24], lambda: torch.randn(48, 32).half()[:, 1:24],
    lambda: torch.randn(6, 2, 3, 5), lambda: torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last),
    lambda: torch.randn(5, 7).double().t(), lambda: torch.randn(9, 3, dtype=torch.complex64),
    lambda: torch.randn(9, 3, dtype=torch.complex128), lambda: torch.randint(0, 9, (7, 5)),
    lambda: torch.randint(0, 9, (7, 5), dtype=torch.int8), lambda: torch.rand(7, 5) > 0.5,
    lambda: torch.randn(7, 6).to(torch.float8_e4m3fn), lambda: torch.randn(2**16 + 3), lambda: torch.randn(7).bfloat16(),
    lambda: torch.tensor(3.0), lambda: torch.randn(0, 4), lambda: torch.zeros(3, 300_001, dtype=torch.int8),
    lambda: torch.randn(30, 20).expand(30, 20), lambda: torch.randn(1, 20).expand(30, 20),
], ids=["transposed", "odd offset", "odd offset of 16 bits", "4d", "channels last", "float64 transposed", "complex64",
        "complex128", "int64", "int8", "bool", "float8", "long vector", "vector", "scalar", "empty", "wide bytes", "expanded",
        "one row expanded"])
def test_tensors_of_any_layout(make):
    """tensors of every dtype, stride and size: a flipped bit is seen in any of them"""
    tensor = make()
    model = Odd(tensor)
    guard = guarding.Guard(model, BoundSelection(None, (), "frozen", None), True)
    guard.check()
    if not tensor.numel():
        return
    matrix = tensor.reshape(matrix_shape(tensor.shape))
    matrix = matrix if matrix.data_ptr() == tensor.data_ptr() else tensor[:, :, 0, 0]
    row, column = len(matrix) - 1, matrix.shape[1] // 2
    flip(matrix, row, column, 0)
    change, = guard.changes()
    top, bottom = change.rows[-1]
    assert top <= row < bottom and bottom - top <= (guarding.FOLD if len(matrix) >= 2**16 else len(matrix))
    flip(matrix, row, column, 0)
    guard.check()


def test_buffers():
    """a buffer that moves, watched by default and left out on request"""
    model = tiny()
    heads = some_heads(model)
    strict, loose = alps.guard(model, heads), alps.guard(model, heads, buffers=False)
    model.model.rotary_emb.inv_freq[1] += 1
    loose.check()
    with pytest.raises(alps.GuardError, match="model.rotary_emb.inv_freq rows 1"):
        strict.check()


def test_tensors_that_are_replaced():
    """a parameter deleted, cast to another dtype or replaced by other values"""
    model = tiny()
    heads = some_heads(model)
    guard = alps.guard(model, heads)
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    guard.check()
    norm.weight = nn.Parameter(norm.weight.detach().bfloat16())
    with pytest.raises(alps.GuardError, match=r"model.norm.weight \(it was float32 \[32\] and is bfloat16 \[32\]\)"):
        guard.check()
    del norm.weight
    with pytest.raises(alps.GuardError, match=r"model.norm.weight \(it is gone\)"):
        guard.check()


def test_the_error_names_places_and_counts_the_rest():
    """many tensors at once: four are named, the others counted, all are in `changes`"""
    model = tiny()
    guard = alps.guard(model, some_heads(model))
    for layer in model.model.layers:
        for weight in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight, layer.mlp.gate_proj.weight):
            weight.data[1:4:2, 5] += 1
    with pytest.raises(alps.GuardError, match="columns 5 of rows 1, 3; .*and 2 more tensors") as caught:
        guard.check()
    assert len(caught.value.changes) == 6


def test_it_watches_an_optimizer():
    """checked after every n-th step, until the handle is removed"""
    model = tiny()
    optimizer = optimizer_of(model, some_heads(model))
    handle = alps.guard(model).watch(optimizer, every=3)
    train(model, optimizer, 3)
    model.model.norm.weight.data[0] += 1
    train(model, optimizer, 2)
    with pytest.raises(alps.GuardError, match="model.norm.weight"):
        train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 6)


def test_a_masked_optimizer_is_caught():
    """torch's AdamW on masked gradients: its weight decay moves frozen rows, and the guard says so"""
    model = tiny()
    heads = some_heads(model)
    bound = heads.freeze(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    with pytest.raises(alps.GuardError, match="q_proj.weight.* rows"), alps.guard(model, heads):
        loss_of_masked(model, bound)
        optimizer.step()


def loss_of_masked(model, bound):
    from .models import loss_of

    loss_of(model, 0).backward()
    for part in bound.params:
        mask = torch.zeros_like(part.param)
        for block in part.blocks(mask):
            block.fill_(1)
        part.param.grad *= mask


def test_an_error_inside_keeps_its_cause():
    """an exception in the guarded block does not hide a moved byte, nor the other way round"""
    model = tiny()
    with pytest.raises(KeyError), alps.guard(model, some_heads(model)):
        raise KeyError("mine")
    with pytest.raises(alps.GuardError) as caught, alps.guard(model, some_heads(model)):
        model.model.norm.weight.data.zero_()
        raise KeyError("mine")
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.parametrize("call, error, message", [
    (lambda m: alps.guard(m), ValueError, "nothing says what trains"),
    (lambda m: alps.guard(m, [(0, 0)]), TypeError, "heads is a list"),
    (lambda m: alps.guard(m, some_heads(tiny("gpt2", n_layer=3))), ValueError, "12 heads in 3 layers"),
    (lambda m: alps.guard(m, some_heads(m).bind(tiny())), ValueError, "q_proj.weight of the selection is not a parameter"),
    (lambda m: alps.guard(m.to("meta"), some_heads(m)), ValueError, "embed_tokens.weight is torch.strided on meta"),
    (lambda m: alps.guard(m, some_heads(m)).watch(torch.optim.SGD(m.parameters()), every=0), ValueError, "every is 0"),
    (lambda m: alps.guard(m, some_heads(m)).watch(torch.optim.SGD(m.parameters()), every=True), ValueError, "every is True"),
])
def test_wrong_arguments(call, error, message):
    """no selection, another model's, a meta model, a step count that is none"""
    with pytest.raises(error, match=message):
        call(tiny())


@pytest.mark.parametrize("edit, check", [
    (("rows.append(products.sum(1))", "rows.append(slab.sum(1).to(torch.int64))"), lambda: test_bytes_that_change_places("signs", torch.float32)),
    ((".unbind(1)", ".mul(0).unbind(1)"), lambda: test_bytes_that_change_places("byte", torch.float32)),
    (("complement(part.ranges, matrix.shape[part.dim])", "part.ranges"), lambda: test_a_flipped_bit("llama", torch.float32, "frozen")),
    (("complement(part.ranges, matrix.shape[part.dim])", "((0, matrix.shape[part.dim]),)"), lambda: test_a_change_inside_is_not_seen("llama", "frozen")),
    (("complement(part.ranges, matrix.shape[part.dim])", "complement(part.ranges, matrix.shape[part.dim])[:-1]"), lambda: test_a_flipped_bit("gpt2", torch.float32, "frozen")),
    (("matrix.narrow(part.dim, start, stop - start)", "matrix.narrow(part.dim, start, stop - start - 1)"), lambda: test_a_flipped_bit("llama", torch.bfloat16, "frozen")),
    (("if self._buffers else ()", "if not self._buffers else ()"), test_buffers),
    (("    yield vector[whole:].view(1, -1)", "    pass"), lambda: test_tensors_of_any_layout(lambda: torch.randn(2**16 + 3))),
    (("if steps % every == 0:", "if steps % every == 1:"), test_it_watches_an_optimizer),
    (("        self.check()\n\n    # --", "        kind or self.check()\n\n    # --"), test_an_error_inside_keeps_its_cause),
    (("elif _facts(now[name]) != facts:", "elif False:"), test_tensors_that_are_replaced),
    (("(start, 0) if part.dim == 0 else (0, start)", "(0, 0)"), lambda: test_a_flipped_bit("llama", torch.float32, "frozen")),
], ids=["no keys", "equal keys", "inside for outside", "no mask", "the last rectangle", "the last row", "buffers", "the tail",
        "when", "errors", "dtypes", "places"])
def test_faults_in_the_guard_are_seen(monkeypatch, edit, check):
    """12 faults planted in the guard itself, each seen by the check beside it"""
    plant(monkeypatch, guarding, edit)
    with pytest.raises(BaseException):  # an assertion, or what the faulty code raises itself
        check()
