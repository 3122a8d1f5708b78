"""Random files, random models and random scores: readers refuse or read, layouts hold, scores keep their symmetries."""

import copy
import json
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import alps_kernels as alps
from alps_kernels.ops import METRICS
from tests.census import oracle as census_oracle
from tests.fuzz import readers

from .models import same, tiny

pytestmark = pytest.mark.fault("Fuzz")
RUN = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([[0, 1], "q", "any", 1e308]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file for every reader, as bytes."""
    found = {}
    for target in readers.TARGETS:
        folder = tmp_path_factory.mktemp(target) / "seeds"
        readers.seeds(target, folder)
        found[target] = next(folder.iterdir()).read_bytes()
        assert readers.attempt(target, found[target])
    return found


@pytest.mark.parametrize("target", list(readers.TARGETS))
@settings(max_examples=120, **RUN)
@given(data=st.data())
def test_damaged_files(target, whole, data):
    """120 files of heads, scores, patches and shard indexes with bytes changed, cut or put in: refused by a ValueError, or read"""
    good = whole[target]
    for _ in range(data.draw(st.integers(1, 3))):
        at, n = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 12))
        good = good[:at] + data.draw(st.binary(max_size=12)) + good[at + n:]
    readers.attempt(target, good)


@pytest.mark.parametrize("target", ["heads", "scores", "index"])
@settings(max_examples=150, **RUN)
@given(data=st.data())
def test_documents_with_something_else_in_a_place(target, whole, data):
    """150 JSON documents with an entry replaced by, or joined by, any other JSON: refused by a ValueError, or read"""
    document = json.loads(whole[target])
    node, key = document, data.draw(st.sampled_from(sorted(document)))
    while isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    node[key] = data.draw(JSON)
    readers.attempt(target, json.dumps(document).encode())


@settings(max_examples=40, **RUN)
@given(data=st.data())
def test_any_selection_survives_its_file(data):
    """40 random selections: what a file gives back is the selection"""
    sizes = data.draw(st.lists(st.integers(0, 6), max_size=5))
    pairs = [(layer, head) for layer, n in enumerate(sizes) for head in range(n)]
    heads = alps.HeadSelection(data.draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else [], sizes,
                               kv=data.draw(st.sampled_from(["any", "all", "none"])),
                               parts=data.draw(st.lists(st.sampled_from("qkvo"), min_size=1, unique=True)),
                               provenance=data.draw(st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)))
    path = readers.FILE.with_suffix(".json")
    heads.save(path)
    again = alps.HeadSelection.load(path)
    assert again == heads and again.provenance == heads.provenance


# -- layouts ---------------------------------------------------------------------------------


CONFIGS = {
    "llama": ("hidden_size", "num_attention_heads", "num_key_value_heads"), "qwen2": ("hidden_size", "num_attention_heads", "num_key_value_heads"),
    "qwen3": ("hidden_size", "num_attention_heads", "num_key_value_heads"), "gemma2": ("hidden_size", "num_attention_heads", "num_key_value_heads"),
    "phi3": ("hidden_size", "num_attention_heads", "num_key_value_heads"), "gpt2": ("n_embd", "n_head", None),
    "gpt_neox": ("hidden_size", "num_attention_heads", None), "bert": ("hidden_size", "num_attention_heads", None),
    "gpt_bigcode": ("n_embd", "n_head", None), "olmo2": ("hidden_size", "num_attention_heads", "num_key_value_heads"),
}


@pytest.mark.parametrize("family", list(CONFIGS))
@settings(max_examples=5, **RUN)
@given(data=st.data())
def test_layouts_of_random_sizes(family, data):
    """5 random head counts, groups, head sizes and depths of each of 10 architectures: layout and behaviour agree, by two checks"""
    from transformers import AutoConfig, AutoModelForCausalLM

    width, n_heads, n_groups = CONFIGS[family]
    groups = data.draw(st.integers(1, 3))
    heads = groups * data.draw(st.integers(1, 3))
    size = 2 * data.draw(st.integers(2, 6))
    sizes = {width: heads * size, n_heads: heads, "num_hidden_layers" if width == "hidden_size" else "n_layer": data.draw(st.integers(1, 2)),
             "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if width == "hidden_size":
        sizes["intermediate_size"] = 16
    if n_groups:
        sizes[n_groups] = groups
        if family in ("llama", "qwen3", "gemma2"):
            sizes["head_dim"] = size = 2 * data.draw(st.integers(2, 6))
    if family == "bert":
        sizes["is_decoder"] = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    layout = alps.find_heads(model)
    assert layout.heads_per_layer == (heads,) * len(layout.layers)
    census_oracle.randomize(model)
    layout.verify(model)
    recording = census_oracle.Recording()
    recording.run(model, {"input_ids": torch.randint(3, 40, (2, 7))})
    wrong = census_oracle.check_coverage(model, layout) + census_oracle.missed(model, recording, layout)
    assert not wrong + [line for layer in layout.layers for line in census_oracle.check_layer(model, recording, layer)]


# -- scores ----------------------------------------------------------------------------------


def pair(**sizes):
    base, task = tiny(**sizes), tiny(**sizes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in task.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 1e-3)
    return base, task


@pytest.mark.parametrize("representation", ["projection", "qkv", "o"])
@pytest.mark.parametrize("metric", list(METRICS))
def test_a_model_beside_itself(metric, representation):
    """identical models: every score is exactly zero, with a warning that says so"""
    base, task = tiny(), tiny()
    with pytest.warns(UserWarning, match="identical attention weights"):
        assert not alps.score_heads(base, task, metric=metric, representation=representation).tensor.any()


@pytest.mark.parametrize("representation", ["projection", "qkv", "o"])
@pytest.mark.parametrize("metric", [m for m in METRICS if m not in ("kl", "relative")])
def test_swapped_models(metric, representation):
    """base and task swapped: the distance is the same, to 2e-6 of it"""
    base, task = pair()
    one, two = (alps.score_heads(a, b, metric=metric, representation=representation).tensor for a, b in ((base, task), (task, base)))
    assert torch.allclose(one, two, rtol=2e-6, atol=0)


@pytest.mark.parametrize("representation", ["projection", "qkv", "q", "o", "qkvo"])
@pytest.mark.parametrize("metric", list(METRICS))
def test_permuted_heads(metric, representation):
    """the heads of both models in another order (groups whole): the same scores in that order, bit for bit"""
    base, task = pair()
    before = alps.score_heads(base, task, metric=metric, representation=representation)
    order, groups = [3, 2, 0, 1], [1, 0]  # of 4 heads in 2 groups of 2
    for model in (base, task):
        for layer in model.model.layers:
            attention, size = layer.self_attn, 8
            rows = torch.cat([torch.arange(h * size, (h + 1) * size) for h in order])
            few = torch.cat([torch.arange(g * size, (g + 1) * size) for g in groups])
            attention.q_proj.weight.data = attention.q_proj.weight.data[rows]
            attention.k_proj.weight.data = attention.k_proj.weight.data[few]
            attention.v_proj.weight.data = attention.v_proj.weight.data[few]
            attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
    after = alps.score_heads(base, task, metric=metric, representation=representation)
    for (layer, head), score in after.values.items():
        assert score == before[layer, order[head]]


@pytest.mark.parametrize("representation, power", [("projection", 3), ("qkv", 1), ("o", 1)])
@pytest.mark.parametrize("metric", [m for m in METRICS if m not in ("euclidean", "relative", "cosine_weights")])
def test_temperature_is_a_scale_of_the_weights(metric, representation, power):
    """weights times two (exact) at the temperature that undoes it: the same scores, to 2e-6"""
    base, task = pair()
    one = alps.score_heads(base, task, metric=metric, representation=representation).tensor
    for model in (base, task):
        for param in model.parameters():
            param.data *= 2
    two = alps.score_heads(base, task, metric=metric, representation=representation, temperature=2.0**power).tensor
    assert torch.allclose(one, two, rtol=2e-6, atol=0)


@pytest.mark.parametrize("metric", ["pad", "pad_values", "kl", "cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_up_cast(dtype, metric):
    """16-bit weights cast up to float32, one model or both: the same scores, bit for bit"""
    base, task = (model.to(dtype) for model in pair())
    want = alps.score_heads(base, task, metric=metric).tensor
    wide = [copy.deepcopy(model).float() for model in (base, task)]
    for a, b in ((wide[0], wide[1]), (base, wide[1]), (wide[0], task)):
        assert same(alps.score_heads(a, b, metric=metric).tensor, want)


@settings(max_examples=15, **RUN)
@given(data=st.data())
def test_top_heads_follow_what_moved(data):
    """15 models with one head moved and the rest left alone: that head scores highest by every metric, the others zero"""
    base, task = tiny(), tiny()
    layer, head = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 3)))
    task.model.layers[layer].self_attn.q_proj.weight.data[8 * head:8 * head + 8] += torch.randn(8, 32) * data.draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = alps.score_heads(base, task, metric=list(METRICS), representation="qkv")
    for found in scores.values():
        assert found.ranking()[0] == (layer, head) and math.isfinite(found[layer, head]) and found[layer, head] > 0
        assert not any(score for place, score in found.values.items() if place != (layer, head))
