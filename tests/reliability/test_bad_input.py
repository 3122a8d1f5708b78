"""Arguments and files that cannot be right: each is refused by name, as a TypeError, ValueError, LayoutError or OSError."""

import json
import math
import pickle
import struct

import pytest
import torch
from torch import nn

import alps_kernels as alps
from alps_kernels.selection import BoundParam

from .models import assert_same, bytes_of, some_heads, tiny

pytestmark = pytest.mark.fault("Bad input")


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def other():
    return tiny(seed=1)


@pytest.fixture(scope="module")
def heads(model):
    return some_heads(model)


def param(*shape, dtype=torch.float32, **options):
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=dtype.is_floating_point or dtype.is_complex, **options)


def adamw(*params, **options):
    return alps.HeadAdamW([(f"w{i}", p) for i, p in enumerate(params)], **options)


def shared():
    memory = torch.zeros(40)
    return [nn.Parameter(memory[:20].view(4, 5)), nn.Parameter(memory[10:30].view(4, 5))]


OPTIMIZER = {
    "a model": (lambda: alps.HeadAdamW(nn.Linear(2, 2)), TypeError, "not iterable"),
    "a tensor": (lambda: alps.HeadAdamW(torch.zeros(3)), TypeError, "iterable of Tensors or dicts"),
    "numbers": (lambda: alps.HeadAdamW([1, 2]), TypeError, "one of the params is int"),
    "nothing": (lambda: alps.HeadAdamW([]), ValueError, "empty parameter list"),
    "a result": (lambda: alps.HeadAdamW([param(2) * 2]), ValueError, "non-leaf"),
    "a set": (lambda: alps.HeadAdamW([{"params": {param(2)}}]), TypeError, "ordered collections"),
    "lr nan": (lambda: adamw(param(2), lr=math.nan), ValueError, "learning rate: nan"),
    "lr negative": (lambda: adamw(param(2), lr=-1.0), ValueError, "learning rate: -1.0"),
    "lr of two": (lambda: adamw(param(2), lr=torch.tensor([1.0, 2.0])), ValueError, "1-element"),
    "eps nan": (lambda: adamw(param(2), eps=math.nan), ValueError, "epsilon value: nan"),
    "decay nan": (lambda: adamw(param(2), weight_decay=math.nan), ValueError, "weight_decay value: nan"),
    "decay negative": (lambda: adamw(param(2), weight_decay=-0.1), ValueError, "weight_decay value: -0.1"),
    "beta one": (lambda: adamw(param(2), betas=(1.0, 0.9)), ValueError, "index 0: 1.0"),
    "beta nan": (lambda: adamw(param(2), betas=(0.9, math.nan)), ValueError, "index 1: nan"),
    "norm zero": (lambda: adamw(param(2), max_grad_norm=0), ValueError, "max_grad_norm is 0"),
    "norm negative": (lambda: adamw(param(2), max_grad_norm=-1), ValueError, "max_grad_norm is -1"),
    "norm nan": (lambda: adamw(param(2), max_grad_norm=math.nan), ValueError, "max_grad_norm is nan"),
    "norm text": (lambda: adamw(param(2), max_grad_norm="1"), ValueError, "max_grad_norm is '1'"),
    "norm True": (lambda: adamw(param(2), max_grad_norm=True), ValueError, "max_grad_norm is True"),
    "seed float": (lambda: adamw(param(2), seed=1.0), ValueError, "seed is 1.0"),
    "seed True": (lambda: adamw(param(2), seed=True), ValueError, "seed is True"),
    "master": (lambda: adamw(param(2), master="Split"), ValueError, "master is 'Split'"),
    "master of a group": (lambda: alps.HeadAdamW([{"params": [param(2)], "master": 16}]), ValueError, "group 0: master is 16"),
    "moments float64": (lambda: adamw(param(2), moment_dtype=torch.float64), ValueError, "moment_dtype is torch.float64"),
    "moments text": (lambda: adamw(param(2), moment_dtype="bf16"), ValueError, "moment_dtype is 'bf16'"),
    "differentiable": (lambda: adamw(param(2), differentiable=True), ValueError, "not differentiable"),
    "complex64": (lambda: adamw(param(2, dtype=torch.complex64)), ValueError, "w0 has dtype torch.complex64"),
    "complex128": (lambda: adamw(param(2, dtype=torch.complex128)), ValueError, "w0 has dtype torch.complex128"),
    "int8": (lambda: adamw(param(2, dtype=torch.int8)), ValueError, "w0 has dtype torch.int8"),
    "int64": (lambda: adamw(param(2), param(2, dtype=torch.int64)), ValueError, "w1 has dtype torch.int64"),
    "bool": (lambda: adamw(param(2, dtype=torch.bool)), ValueError, "w0 has dtype torch.bool"),
    "float8": (lambda: adamw(nn.Parameter(torch.zeros(2, 2).to(torch.float8_e4m3fn))), ValueError, "w0 has dtype torch.float8_e4m3fn"),
    "sparse": (lambda: adamw(nn.Parameter(torch.zeros(2, 2).to_sparse())), ValueError, "w0 has layout torch.sparse_coo"),
    "expanded": (lambda: adamw(nn.Parameter(torch.zeros(1, 4).expand(3, 4))), ValueError, "w0 is expanded"),
    "shared memory": (lambda: adamw(*shared()), ValueError, "w0 and w1 share memory"),
    "the same memory": (lambda: adamw(*[nn.Parameter(shared()[0].data) for _ in "1"], *(lambda t: [nn.Parameter(t), nn.Parameter(t)])(torch.zeros(4))),
                        ValueError, "w1 and w2 share memory"),
    "heads a list": (lambda: adamw(param(2), heads=[(0, 0)]), TypeError, "heads is a list"),
    "heads unbound": (lambda: adamw(param(2), heads=alps.HeadSelection([], [2])), TypeError, "heads is a HeadSelection"),
    "heads of another model": (lambda: alps.HeadAdamW(tiny().parameters(), heads=some_heads(tiny()).bind(tiny())), ValueError,
                               "q_proj.weight holds selected slices but is not among"),
    "heads of some params": (lambda: (lambda m: alps.HeadAdamW(m.lm_head.parameters(), heads=some_heads(m).bind(m)))(tiny()), ValueError,
                             "q_proj.weight holds selected slices but is not among"),
    "an added group": (lambda: adamw(param(2)).add_param_group({"params": [("w1", param(2))], "moment_dtype": 3}), ValueError, "group 1: moment_dtype is 3"),
    "the same again": (lambda: (lambda p: adamw(p).add_param_group({"params": [("again", p)]}))(param(2)), ValueError, "more than one parameter group"),
    "set_heads": (lambda: adamw(param(2)).set_heads([(0, 0)]), TypeError, "heads is a list"),
}


@pytest.mark.parametrize("case", OPTIMIZER)
def test_optimizers_that_cannot_be(case):
    """HeadAdamW of wrong arguments, dtypes, layouts, overlapping or expanded memory, or other heads"""
    call, error, message = OPTIMIZER[case]
    with pytest.raises(error, match=message):
        call()


def with_grad(grad, shape=(3, 4), dtype=torch.float32):
    p = param(*shape, dtype=dtype)
    optimizer = adamw(p)
    p.grad = grad
    return p, optimizer


@pytest.mark.parametrize("make, error, message", [
    (lambda: with_grad(torch.ones(3, 4).to_sparse()), RuntimeError, "sparse gradients: that of w0"),
    (lambda: moved(torch.float64), ValueError, "w0 is torch.float64 and was torch.float32"),
    (lambda: moved(torch.bfloat16), ValueError, "w0 is torch.bfloat16 and was torch.float32"),
    (lambda: resized(), ValueError, r"w0 is \[2, 4\] now: what trains of it reaches to 3"),
], ids=["sparse", "cast to float64", "cast to bfloat16", "resized"])
def test_gradients_and_parameters_that_do_not_fit(make, error, message):
    """sparse gradients, parameters cast or resized behind the optimizer's back: named, nothing moved"""
    p, optimizer = make()
    before = p.detach().clone()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


def moved(dtype):
    p, optimizer = with_grad(torch.ones(3, 4))
    p.grad = None
    p.data = p.data.to(dtype)
    p.grad = torch.ones(3, 4, dtype=dtype)
    return p, optimizer


def resized():
    p = param(3, 4)
    optimizer = alps.HeadAdamW([("w0", p)], heads=alps.BoundSelection(alps.HeadSelection([], []), (BoundParam("w0", p, 0, ((0, 3),)),), "frozen", None))
    p.data = torch.zeros(2, 4)
    p.grad = torch.ones(2, 4)
    return p, optimizer


def saved(**changes):
    p = param(2)
    p.grad = torch.ones(2)
    optimizer = adamw(p)
    optimizer.step()
    return {**optimizer.state_dict(), **changes}


STATES = {
    "None": (None, TypeError, "is a NoneType"), "a list": ([], TypeError, "is a list"), "empty": ({}, ValueError, "expected a state dict"),
    "groups of numbers": (saved(param_groups=[1]), ValueError, "group 0 of the state dict has no list of params"),
    "groups of nothing": (saved(param_groups=[{}]), ValueError, "group 0 of the state dict has no list of params"),
    "keys that are lists": (saved(param_groups=[{"params": [[0]]}]), ValueError, "group 0 of the state dict has no list of params"),
    "a number for a state": (saved(state={0: 5}), ValueError, "w0: its saved state is a int"),
    "a list for the states": (saved(state=[]), ValueError, "expected a state dict"),
    "alps None": (saved(alps=None), ValueError, "not HeadAdamW's"), "alps a list": (saved(alps=[]), ValueError, "not HeadAdamW's"),
    "alps of tomorrow": (saved(alps={"format": "alps_kernels.head_adamw", "version": 99}), ValueError, "version 99"),
    "alps without params": (saved(alps={"format": "alps_kernels.head_adamw", "version": 1}), ValueError, "no parameters"),
    "a negative step": (saved(state={0: {"step": torch.tensor(-1.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}), ValueError, "saved step is"),
    "half a step": (saved(state={0: {"step": torch.tensor(0.5), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}), ValueError, "saved step is"),
    "an infinite step": (saved(state={0: {"step": torch.tensor(math.inf), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}), ValueError, "saved step is"),
    "text for moments": (saved(state={0: {"step": torch.tensor(1.0), "exp_avg": "x", "exp_avg_sq": torch.zeros(2)}}), ValueError, "no exp_avg"),
    "moments of another shape": (saved(state={0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(2)}}), ValueError, r"exp_avg has shape \[3\]"),
}


@pytest.mark.parametrize("case", STATES)
def test_states_that_cannot_be(case):
    """state dicts of the wrong kind, version, shape or step count: refused by name, the optimizer unchanged"""
    state, error, message = STATES[case]
    optimizer = adamw(param(2))
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3


S = alps.HeadSelection
SELECTIONS = {
    "heads None": (lambda m, h: S(None, [4]), TypeError, "heads is None"), "heads 3": (lambda m, h: S(3, [4]), TypeError, "heads is 3"),
    "a string": (lambda m, h: S("00", [4]), ValueError, "'0' is not a .layer, head. pair"),
    "a head twice": (lambda m, h: S([(0, 1), (0, 1)], [4]), ValueError, r"\(0, 1\) is given twice"),
    "a layer too far": (lambda m, h: S([(1, 0)], [4]), ValueError, "there are 1 layers"),
    "a head too far": (lambda m, h: S([(0, 4)], [4]), ValueError, "layer 0 has 4 heads"),
    "a negative head": (lambda m, h: S([(0, -1)], [4]), ValueError, "head .0, -1. has index -1"),
    "nan": (lambda m, h: S([(0, math.nan)], [4]), ValueError, "index nan"),
    "sizes None": (lambda m, h: S([], None), TypeError, "heads_per_layer is None"),
    "sizes negative": (lambda m, h: S([], [-1]), ValueError, "heads_per_layer has -1"),
    "sizes of text": (lambda m, h: S([], "44"), ValueError, "heads_per_layer has '4'"),
    "sizes of floats": (lambda m, h: S([], [4.0]), ValueError, "heads_per_layer has 4.0"),
    "kv": (lambda m, h: S([], [4], kv=None), ValueError, "kv is None"), "kv a list": (lambda m, h: S([], [4], kv=["any"]), ValueError, "kv is"),
    "parts None": (lambda m, h: S([], [4], parts=None), ValueError, "parts is None"), "parts 3": (lambda m, h: S([], [4], parts=3), ValueError, "parts is 3"),
    "parts of lists": (lambda m, h: S([], [4], parts=[["q"]]), ValueError, "parts is"),
    "provenance": (lambda m, h: S([], [4], provenance="x"), TypeError, "provenance is a str"),
    "summary 3": (lambda m, h: S([], [4], summary=3), TypeError, "summary is 3"),
    "summary of numbers": (lambda m, h: S([], [4], summary=[1]), TypeError, "LayerSummary"),
    "ratio nan": (lambda m, h: S.random(h, math.nan), ValueError, "ratio is nan"), "ratio 2": (lambda m, h: S.random(h, 2), ValueError, "ratio is 2"),
    "ratio negative": (lambda m, h: S.random(h, -1e-9), ValueError, "ratio is -1e-09"),
    "ratio text": (lambda m, h: S.random(h, "10%"), ValueError, "ratio is '10%'"),
    "ratio and k": (lambda m, h: S.random(h, 0.1, k=1), ValueError, "either a ratio or k"), "neither": (lambda m, h: S.random(h), ValueError, "either a ratio or k"),
    "k too large": (lambda m, h: S.random(h, k=9), ValueError, "from 0 to 8"), "k float": (lambda m, h: S.random(h, k=1.0), ValueError, "k is 1.0"),
    "k of a layer": (lambda m, h: S.layer_consistent(h, k=5), ValueError, "from 0 to 4"),
    "like text": (lambda m, h: S.random("model", 0.1), TypeError, "like is a str"), "like a model": (lambda m, h: S.all(m), TypeError, "like is a LlamaForCausalLM"),
    "like None": (lambda m, h: S.none(None), TypeError, "like is a NoneType"), "like a list": (lambda m, h: S.layer_consistent([4], 0.5), TypeError, "like is a list"),
    "or a set": (lambda m, h: h | {(0, 0)}, TypeError, "not set"), "other kv": (lambda m, h: h & S([], h.heads_per_layer, kv="all", parts=h.parts), ValueError, "differ in kv"),
    "other parts": (lambda m, h: h - S([], h.heads_per_layer), ValueError, "differ in parts"), "other sizes": (lambda m, h: h ^ S([], [4], parts=h.parts), ValueError, "differ in heads_per_layer"),
    "bind text": (lambda m, h: h.bind("model"), TypeError, "the model is a str"), "bind no heads": (lambda m, h: h.bind(nn.Linear(2, 2)), alps.LayoutError, "no module of this model holds"),
    "bind another": (lambda m, h: h.bind(tiny("gpt2", n_layer=3)), ValueError, "8 heads in 2 layers"),
    "another layout": (lambda m, h: h.bind(m, layout=alps.find_heads(tiny("gpt2"))), alps.LayoutError, "c_attn.weight, which this model does not have"),
    "layout text": (lambda m, h: h.bind(m, layout="x"), TypeError, "layout is a str"), "rest": (lambda m, h: h.freeze(m, "thawed"), ValueError, "rest is 'thawed'"),
    "rest a list": (lambda m, h: h.bind(m, rest=[]), ValueError, r"rest is \[\]"), "freeze None": (lambda m, h: h.freeze(None), TypeError, "the model is a NoneType"),
    "find None": (lambda m, h: alps.find_heads(None), TypeError, "the model is a NoneType"), "find a class": (lambda m, h: alps.find_heads(type(m)), TypeError, "the model is a type"),
    "slice for text": (lambda m, h: alps.slice_heads(m, "x"), TypeError, "heads is a str"), "slice None": (lambda m, h: alps.slice_heads(None, h), TypeError, "the model is a NoneType"),
    "slice another": (lambda m, h: alps.slice_heads(tiny("gpt2", n_layer=3), h), ValueError, "8 heads in 2 layers"),
    "slice rest": (lambda m, h: alps.slice_heads(m, h, rest="all"), ValueError, "rest is 'all'"), "slice bound": (lambda m, h: alps.slice_heads(m, h.bind(m)), TypeError, "heads is a BoundSelection"),
    "unslice": (lambda m, h: alps.unslice_heads(m), ValueError, "not sliced"),
    "apply None": (lambda m, h: alps.apply_patch(m, None), TypeError, "a patch is a NoneType"), "apply 5": (lambda m, h: alps.apply_patch(m, [5]), TypeError, "a patch is a int"),
    "apply nothing there": (lambda m, h: alps.apply_patch(m, "/nowhere/p.safetensors"), FileNotFoundError, "/nowhere/p.safetensors"),
    "revert nothing": (lambda m, h: alps.revert_patch(m), ValueError, "no patch is on this model"),
    "save of what": (lambda m, h: alps.save_patch(tiny(), "p.safetensors"), ValueError, "nothing says which heads"),
    "save a list": (lambda m, h: alps.save_patch(m, "p.safetensors", [(0, 0)]), TypeError, "heads is a list"),
    "spread too few": (lambda m, h: h.bind(m).params[0].spread(torch.zeros(3), torch.zeros(32, 32)), ValueError, "q_proj.weight: 3 compact elements"),
    "tied slices": (lambda m, h: alps.slice_heads(tied(), h), alps.LayoutError, "layers.1.self_attn .LlamaAttention.: shares"),
}


def tied():
    model = tiny()
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    return model


@pytest.mark.parametrize("case", SELECTIONS)
def test_selections_that_cannot_be(case, model, heads):
    """selections, bindings, slicings and patches of wrong heads, sizes, ratios, models or options; the model unchanged"""
    call, error, message = SELECTIONS[case]
    before = bytes_of(model)
    with pytest.raises(error, match=message):
        call(model, heads)
    assert_same(bytes_of(model), before)


SC = alps.HeadScores
SCORES = {
    "base None": (lambda a, b: alps.score_heads(None, a), TypeError, "base is a NoneType"), "task 5": (lambda a, b: alps.score_heads(a, 5), TypeError, "task is a int"),
    "the same": (lambda a, b: alps.score_heads(a, a), ValueError, "same object"), "nowhere": (lambda a, b: alps.score_heads("/no/a", "/no/b"), FileNotFoundError, "/no/a does not exist"),
    "temperature 0": (lambda a, b: alps.score_heads(a, b, temperature=0), ValueError, "temperature is 0"),
    "temperature nan": (lambda a, b: alps.score_heads(a, b, temperature=math.nan), ValueError, "temperature is nan"),
    "temperature inf": (lambda a, b: alps.score_heads(a, b, temperature=math.inf), ValueError, "temperature is inf"),
    "temperature negative": (lambda a, b: alps.score_heads(a, b, temperature=-1), ValueError, "temperature is -1"),
    "temperature True": (lambda a, b: alps.score_heads(a, b, temperature=True), ValueError, "temperature is True"),
    "metric": (lambda a, b: alps.score_heads(a, b, metric="l2"), ValueError, "metric is 'l2'"), "metric None": (lambda a, b: alps.score_heads(a, b, metric=None), TypeError, "metric is None"),
    "no metric": (lambda a, b: alps.score_heads(a, b, metric=[]), ValueError, r"metric is \[\]"), "metric twice": (lambda a, b: alps.score_heads(a, b, metric=["pad", "pad"]), ValueError, "several different"),
    "metric 1": (lambda a, b: alps.score_heads(a, b, metric=[1]), ValueError, "metric is 1"),
    "representation": (lambda a, b: alps.score_heads(a, b, representation="kqv"), ValueError, "representation is 'kqv'"),
    "attention": (lambda a, b: alps.score_heads(a, b, attention="cross"), ValueError, "no attention called 'cross'"),
    "attention None": (lambda a, b: alps.score_heads(a, b, attention=None), TypeError, "attention is None"),
    "layers": (lambda a, b: alps.score_heads(a, b, attention=[9]), ValueError, r"layers \[9\]"), "layers of text": (lambda a, b: alps.score_heads(a, b, attention=["0"]), TypeError, "attention is"),
    "device": (lambda a, b: alps.score_heads(a, b, device="banana"), ValueError, "device 'banana'"), "device a list": (lambda a, b: alps.score_heads(a, b, device=[]), ValueError, r"device \[\]"),
    "another architecture": (lambda a, b: alps.score_heads(a, tiny("gpt2")), alps.LayoutError, "a llama and GPT2LMHeadModel a gpt2"),
    "other heads": (lambda a, b: alps.score_heads(a, tiny(num_attention_heads=8)), alps.LayoutError, "4 query heads, LlamaForCausalLM has 8"),
    "other layers": (lambda a, b: alps.score_heads(a, tiny(num_hidden_layers=3)), alps.LayoutError, "2 attention layers and LlamaForCausalLM 3"),
    "other widths": (lambda a, b: alps.score_heads(a, tiny(hidden_size=64, head_dim=8)), alps.LayoutError, r"k_proj.weight is \[16, 32\] in"),
    "no weights": (lambda a, b: alps.score_heads(a, tiny(seed=3).to("meta")), ValueError, "meta device"),
    "nan": (lambda a, b: alps.score_heads(a, spoiled(math.nan)), ValueError, "k_proj.weight of the task model .* 1 NaN"),
    "inf": (lambda a, b: alps.score_heads(spoiled(math.inf), a), ValueError, "k_proj.weight of the base model .* 1 NaN or infinite"),
    "metric 3": (lambda a, b: SC([1.0], [0], [1], metric=3), TypeError, "metric is 3"), "temperature": (lambda a, b: SC([1.0], [0], [1], metric="pad", temperature=-1), ValueError, "temperature is -1"),
    "representation None": (lambda a, b: SC([1.0], [0], [1], metric="pad", representation=None), TypeError, "representation is None"),
    "text": (lambda a, b: SC("abc", [0], [1], metric="pad"), TypeError, "scores are a str"), "None": (lambda a, b: SC(None, [0], [1], metric="pad"), TypeError, "scores are a NoneType"),
    "complex": (lambda a, b: SC(torch.zeros(1, dtype=torch.complex64), [0], [1], metric="pad"), TypeError, "complex64"), "meta": (lambda a, b: SC(torch.zeros(1, device="meta"), [0], [1], metric="pad"), TypeError, "on meta"),
    "ragged": (lambda a, b: SC([[1.0], [1.0, 2.0]], [0], [1], metric="pad"), TypeError, "no vector of numbers"), "too many": (lambda a, b: SC([1.0, 2.0], [0], [1], metric="pad"), ValueError, "scores for 1 heads"),
    "layers None": (lambda a, b: SC([1.0], None, [1], metric="pad"), TypeError, "layers is None"), "layers descending": (lambda a, b: SC([1.0] * 2, [1, 0], [1, 1], metric="pad"), ValueError, "ascending"),
    "sizes": (lambda a, b: SC([1.0], [0], ["1"], metric="pad"), ValueError, "heads_per_layer has '1'"), "provenance": (lambda a, b: SC([1.0], [0], [1], metric="pad", provenance=[]), TypeError, "provenance is a list"),
    "a head by number": (lambda a, b: SC([1.0], [0], [1], metric="pad")[0], TypeError, "0 is no .layer, head. pair"), "no such layer": (lambda a, b: SC([1.0], [0], [1], metric="pad")[1, 0], IndexError, "layer 1 was not scored"),
    "no such head": (lambda a, b: SC([1.0], [0], [1], metric="pad")[0, 1], IndexError, "head 1 is not in layer 0"), "head of text": (lambda a, b: SC([1.0], [0], [1], metric="pad")[0, "a"], IndexError, "head a is not"),
    "top of nothing": (lambda a, b: SC([1.0], [0], [1], metric="pad").top(), ValueError, "either a ratio or k"), "scope": (lambda a, b: SC([1.0], [0], [1], metric="pad").top(0.5, scope="head"), ValueError, "scope is 'head'"),
    "top nan": (lambda a, b: SC([1.0], [0], [1], metric="pad").top(math.nan), ValueError, "ratio is nan"), "compare 3": (lambda a, b: SC([1.0], [0], [1], metric="pad").compare(3), TypeError, "not int"),
    "suffix": (lambda a, b: SC([1.0], [0], [1], metric="pad").save("x.npz"), ValueError, "x.npz ends in '.npz'"),
}


def spoiled(value):
    model = tiny(seed=4)
    model.model.layers[1].self_attn.k_proj.weight.data[3, 5] = value
    return model


@pytest.mark.parametrize("case", SCORES)
def test_scores_that_cannot_be(case, model, other):
    """scoring with wrong models, options or weights, and scores of wrong values, layers, heads or options"""
    call, error, message = SCORES[case]
    with pytest.raises(error, match=message):
        call(model, other)


# -- files -----------------------------------------------------------------------------------


def header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def scores_file(path):
    alps.HeadScores([1.0, 2.0], [0], [2], metric="pad").save(path)
    return path.read_bytes()


HEADERS = {
    "empty": lambda good: b"", "seven bytes": lambda good: good[:7], "a length of 2^63": lambda good: struct.pack("<Q", 2**63) + good[8:],
    "a length past the end": lambda good: struct.pack("<Q", len(good)) + good[8:], "zeros": lambda good: bytes(100), "no JSON": lambda good: header(b"{" * 50),
    "a list": lambda good: header(b"[]"), "deep": lambda good: header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "not UTF-8": lambda good: header(b'{"\xff": 1}'),
    "offsets past the end": lambda good: header(b'{"scores":{"dtype":"F64","shape":[2],"data_offsets":[0,999]}}') + bytes(16),
    "offsets backwards": lambda good: header(b'{"scores":{"dtype":"F64","shape":[2],"data_offsets":[16,0]}}') + bytes(16),
    "a huge shape": lambda good: header(b'{"scores":{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,16]}}') + bytes(16),
    "an unknown dtype": lambda good: header(b'{"scores":{"dtype":"F65","shape":[2],"data_offsets":[0,16]}}') + bytes(16),
    "no metadata": lambda good: header(b'{"scores":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}') + bytes(16),
    "metadata of numbers": lambda good: header(b'{"__metadata__":{"a":1},"scores":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}}') + bytes(16),
    "a hole": lambda good: header(b'{"scores":{"dtype":"F64","shape":[1],"data_offsets":[8,16]}}') + bytes(16), "more at the end": lambda good: good + b"x",
    "the tensor renamed": lambda good: good.replace(b'"scores":{', b'"scorex":{', 1), "float32": lambda good: good.replace(b"F64", b"F32", 1), "a pickle": lambda good: pickle.dumps({"scores": 1}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_safetensors(case, tmp_path):
    """scores in safetensors files with torn, hostile or foreign headers: a ValueError that names the file"""
    path = tmp_path / "scores.safetensors"
    path.write_bytes(HEADERS[case](scores_file(path)))
    with pytest.raises(ValueError, match="scores.safetensors"):
        alps.HeadScores.load(path)


@pytest.mark.parametrize("text", [
    "", "null", "1", '"x"', "[]", "{}", "{", "nan", '{"format": "alps_kernels.heads"}', '{"format": "alps_kernels.heads", "version": 0}',
    '{"format": "alps_kernels.heads", "version": 1.0}', '{"format": "alps_kernels.heads", "version": 1}', '{"format": "alps_kernels.heads", "version": 1e400}',
    '{"a":' * 100_000, "\ufeff{}", '{"format": "alps_kernels.scores", "version": 1}', "9" * 5000,
], ids=lambda text: text[:40] or "empty")
@pytest.mark.parametrize("kind", ["heads", "scores"])
def test_hostile_json(kind, text, tmp_path):
    """heads and scores in JSON files that are torn, nested, foreign, of another version, or full of digits"""
    path = tmp_path / "it.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="it.json"):
        (alps.HeadSelection if kind == "heads" else alps.HeadScores).load(path)


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/alps_kernels_bomb", "w"))


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: {"weight": b}, lambda b: {b"x": [b]}], ids=["bare", "in a dict", "nested"])
@pytest.mark.parametrize("how", ["pickle", "torch.save", "torch.save of old"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.pt"])
def test_pickles_that_run_code(name, how, wrap, tmp_path, monkeypatch):
    """checkpoints that are pickles with code, under any name: refused by name, the code is not run"""
    folder = tmp_path / "task"
    tiny().save_pretrained(tmp_path / "base")
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    mark = tmp_path / "ran"
    monkeypatch.setattr(Bomb, "__reduce__", lambda self: (open, (str(mark), "w")))
    if how == "pickle":
        (folder / name).write_bytes(pickle.dumps(wrap(Bomb())))
    else:
        torch.save(wrap(Bomb()), folder / name, _use_new_zipfile_serialization=how == "torch.save")
    assert not mark.exists()
    with pytest.raises(ValueError, match=name):
        alps.score_heads(tmp_path / "base", folder)
    assert not mark.exists()


@pytest.mark.parametrize("target", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors", "..", "", ".", 5, None, ["a"],
                                    "model.py", "x\0y.safetensors"], ids=str)
def test_shards_that_climb(target, tmp_path):
    """an index of shards that points outside its folder, to other kinds of files or to nothing: refused by name"""
    from safetensors.torch import save_file

    model = tiny()
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "task"
    model.save_pretrained(folder, max_shard_size="20KB")
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    name = next(n for n in document["weight_map"] if "q_proj" in n)
    document["weight_map"][name] = target
    index.write_text(json.dumps(document))
    with pytest.raises((ValueError, FileNotFoundError), match="model.safetensors.index.json"):
        alps.score_heads(tmp_path / "base", folder)
