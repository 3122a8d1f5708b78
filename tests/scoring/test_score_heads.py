"""score_heads on models in memory: what is compared, what may differ, what is refused."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, DeepseekV3Config, DeepseekV3ForCausalLM,
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration,
)

import alps_kernels as alps
from alps_kernels import LayoutError
from alps_kernels.ops.delta import oracle
from alps_kernels.scoring import REPRESENTATIONS, score
from alps_kernels.scoring.representations import stacked
from alps_kernels.scoring.score import METRICS
from alps_kernels.weights import weights
from tests.support import real_models


def llama(**changes) -> LlamaForCausalLM:
    """2 layers x 6 heads in 2 groups of head size 8; width 36 is not heads * head size."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 36, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def bert(kind=BertForMaskedLM):
    torch.manual_seed(0)
    return kind(BertConfig(vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4))


def moved(model: nn.Module, delta: float = 1e-3, seed: int = 1) -> nn.Module:
    """A copy with a little noise on every parameter."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in other.parameters():
            param += delta * torch.randn(param.shape, generator=generator).to(param.dtype)
    return other


def matrices(model: nn.Module, layer: int, head: int) -> dict[str, torch.Tensor]:
    """A head's matrices in float64, in the orientation of `nn.Linear`, cut by its layout."""
    params = dict(model.named_parameters())
    return {part.role: part.matrix(params[part.param].detach()).double()
            for part in alps.find_heads(model).slices(layer, head) if not part.bias}


def released(base: torch.Tensor, task: torch.Tensor) -> float:
    """The released score: SciPy's distance of the softmaxed weights, positions in [0, 1]."""
    from scipy.stats import wasserstein_distance

    n = base.numel()
    places = torch.arange(n, dtype=torch.float64) / (n - 1)
    return wasserstein_distance(places, places, *(torch.softmax(w.double().flatten(), 0) for w in (base, task)))


def flat(model: nn.Module, layer: int, head: int, roles: str) -> torch.Tensor:
    of = matrices(model, layer, head)
    return torch.cat([of[role].flatten() for role in roles])


# -- values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", ["qkv", "q", "k", "v", "o", "qkvo"])
def test_grouped_heads_equal_the_released_definition(representation):
    base, task = llama(), moved(llama(), 1e-2)
    scores = alps.score_heads(base, task, representation=representation)
    for layer, head in scores:
        expected = released(*(flat(model, layer, head, representation) for model in (base, task)))
        assert scores[layer, head] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("build", ["llama", "latent"])
def test_every_metric_of_every_representation_is_the_oracles(build, representation, monkeypatch):
    base = globals()[build]()
    task = moved(base, 1e-2)
    found = alps.score_heads(base, task, metric=METRICS, representation=representation)
    for name in ("head_delta", "head_delta_projection"):
        monkeypatch.setattr(score, name, getattr(oracle, name))
    expected = alps.score_heads(base, task, metric=METRICS, representation=representation)
    for name in METRICS:
        torch.testing.assert_close(found[name].tensor, expected[name].tensor, rtol=1e-6, atol=0, msg=name)


def test_projection_is_the_papers():
    base, task = llama(), moved(llama(), 1e-2)
    scores = alps.score_heads(base, task)
    for layer, head in scores:
        expected = released(*(of["q"].T @ of["k"] @ of["v"].T for of in (matrices(m, layer, head) for m in (base, task))))
        assert scores[layer, head] == pytest.approx(expected, rel=1e-6)


def test_right_group_enters():
    base, task = llama(), llama()
    with torch.no_grad():
        task.model.layers[1].self_attn.v_proj.weight[8:] += 0.1  # group 1: heads 3, 4, 5
    scores = alps.score_heads(base, task, representation="qkv", metric="euclidean")
    assert {head for head in scores if scores[head] > 0} == {(1, 3), (1, 4), (1, 5)}


def test_fused_transposed_weights():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=24, n_layer=2, n_head=3, n_positions=16))
    task = copy.deepcopy(base)
    with torch.no_grad():
        task.transformer.h[1].attn.c_attn.weight[:, 24 + 8:24 + 16] += 0.1  # keys of head 1: columns of a Conv1D
    assert alps.score_heads(base, task, representation="k", metric="relative").ranking()[0] == (1, 1)
    task = moved(base, 1e-2)
    scores = alps.score_heads(base, task, representation="qkv")
    expected = released(flat(base, 1, 2, "qkv"), flat(task, 1, 2, "qkv"))
    assert scores[1, 2] == pytest.approx(expected, rel=1e-6)


def latent():
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=32, hidden_size=24, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
        n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1))


def test_latent_attention():
    base, task = latent(), moved(latent(), 1e-2)
    of = [matrices(model, 1, 2) for model in (base, task)]
    assert of[0]["q"].shape == (6, 12) and of[0]["q_rope"].shape == (4, 12)
    products = [m["q"].T @ m["k"] @ m["v"].T for m in of]
    assert alps.score_heads(base, task)[1, 2] == pytest.approx(released(*products), rel=1e-6)
    with_rotary = [torch.cat([m[role].flatten() for role in ("q", "q_rope")]) for m in of]
    assert alps.score_heads(base, task, representation="q")[1, 2] == pytest.approx(released(*with_rotary), rel=1e-6)


@pytest.mark.parametrize("kind", ["self", "cross", "encoder", "decoder-cross", [1, 3]])
def test_which_attention(kind):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=16, num_layers=2, num_heads=3))
    task = moved(base)
    layout = alps.find_heads(base)
    scores, everything = (alps.score_heads(base, task, attention=which) for which in (kind, "all"))
    assert scores.layers == layout.where(kind) and scores.heads_per_layer == layout.heads_per_layer
    assert all(scores[head] == everything[head] for head in scores)
    assert {layer for layer, _ in scores.top(0.5)} <= set(scores.layers)


def test_keys_and_values_of_another_layer():
    from dataclasses import replace

    from alps_kernels.scoring.representations import pieces

    layout = alps.find_heads(llama())
    first, second = layout.layers
    second = replace(second, groups=(), kv_layer=0)
    q, k, v = pieces((first, second), second, "projection")
    assert q.params == {"model.layers.1.self_attn.q_proj.weight"}
    assert k.params == {"model.layers.0.self_attn.k_proj.weight"} and k.index == (0, 0, 0, 1, 1, 1)


# -- what must not matter --------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("representation", ["projection", "qkv"])
def test_identical_models_score_zero_with_a_warning(metric, representation):
    with pytest.warns(UserWarning, match="identical attention weights"):
        scores = alps.score_heads(llama(), llama(), metric=metric, representation=representation)
    assert scores.tensor.count_nonzero() == 0


def test_other_weights_of_score_zero_are_not_taken_for_the_same():
    task = copy.deepcopy(llama())
    with torch.no_grad():
        for param in task.parameters():
            param *= 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert alps.score_heads(llama(), task, metric="cosine_weights", representation="q").tensor.count_nonzero() == 0


def test_heads_are_located_once_for_a_model(monkeypatch):
    found, find = [], weights.find_heads
    monkeypatch.setattr(weights, "find_heads", lambda model: found.append(model) or find(model))
    base, task = llama(), moved(llama())
    first = alps.score_heads(base, task)
    assert torch.equal(alps.score_heads(base, task).tensor, first.tensor) and found == [base, task]
    base.model.layers[1].self_attn.v_proj.weight.data[3, 3] = math.nan  # values are read every time
    with pytest.raises(ValueError, match="layers.1.self_attn.v_proj.weight of the base model"):
        alps.score_heads(base, task)
    wider = moved(base := llama(num_attention_heads=4))
    assert len(alps.score_heads(base, wider)) == 8 and len(found) == 4


def test_heads_are_located_anew_where_a_model_states_others():
    """The same shapes: 4 heads of 8, then 8 heads of 4."""
    models = base, task = llama(num_attention_heads=4, attention_bias=False), moved(
        llama(num_attention_heads=4, attention_bias=False))
    assert alps.score_heads(base, task).heads_per_layer == (4, 4)
    for model in models:
        model.config.update({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4})
        for layer in model.model.layers:
            layer.self_attn.head_dim = 4
    assert alps.score_heads(base, task).heads_per_layer == (8, 8)


def test_permuted_heads_permute_their_scores():
    base, task = (bert() for _ in range(2))
    task = moved(task)
    order = torch.tensor([2, 0, 3, 1])
    rows = (order[:, None] * 8 + torch.arange(8)).flatten()
    before = alps.score_heads(base, task, metric=METRICS, representation="qkv")
    with torch.no_grad():
        for model in (base, task):
            attention = model.bert.encoder.layer[1].attention.self
            for linear in (attention.query, attention.key, attention.value):
                linear.weight.copy_(linear.weight[rows])
    after = alps.score_heads(base, task, metric=METRICS, representation="qkv")
    for name in METRICS:
        assert torch.allclose(after[name].by_layer()[1], before[name].by_layer()[1][order], rtol=1e-9, atol=0)
        assert torch.equal(after[name].by_layer()[0], before[name].by_layer()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_copy_scores_the_same(dtype):
    base, task = llama().to(dtype), moved(llama().to(dtype), 3e-2)
    narrow = alps.score_heads(base, task, metric=METRICS)
    for first, second in ((base, copy.deepcopy(task).float()), (copy.deepcopy(base).float(), task),
                          (copy.deepcopy(base).double(), copy.deepcopy(task).float())):
        mixed = alps.score_heads(first, second, metric=METRICS)
        for name in METRICS:
            assert torch.allclose(mixed[name].tensor, narrow[name].tensor, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("metric", ["pad", "pad_index", "pad_values", "js", "cosine", "cosine_weights", "euclidean"])
def test_symmetric_metrics(metric):
    base, task = llama(), moved(llama(), 1e-2)
    there, back = (alps.score_heads(*pair, metric=metric).tensor for pair in ((base, task), (task, base)))
    assert torch.allclose(there, back, rtol=1e-5, atol=0)


def test_several_metrics_are_one_read():
    base, task = llama(), moved(llama())
    together = alps.score_heads(base, task, metric=("kl", "pad"))
    assert list(together) == ["kl", "pad"] and together["kl"].metric == "kl"
    assert torch.equal(together["pad"].tensor, alps.score_heads(base, task).tensor)


def test_temperature_counts_and_is_kept():
    base, task = llama(), moved(llama(), 1e-2)
    scores = alps.score_heads(base, task, temperature=0.5, representation="q")
    expected = released(*(2 * flat(model, 0, 3, "q") for model in (base, task)))
    assert scores[0, 3] == pytest.approx(expected, rel=1e-6) and scores.temperature == 0.5


def test_layers_together_score_the_same(monkeypatch):
    """What a GPU is given is the segments of every layer in one call; the CPU is given some layers'."""
    from alps_kernels.scoring import score as scoring

    base, task, calls, found = llama(num_hidden_layers=3), moved(llama(num_hidden_layers=3)), [], []
    real = scoring.head_delta_projection
    monkeypatch.setattr(scoring, "head_delta_projection", lambda layers, *a, **k: calls.append(len(layers)) or real(layers, *a, **k))
    of_a_layer = sum(getattr(base.model.layers[0].self_attn, name).weight.numel() for name in ("q_proj", "k_proj", "v_proj"))
    for together in (0, 2 * of_a_layer, scoring.TOGETHER, math.inf):
        monkeypatch.setattr(scoring, "TOGETHER", together)
        found.append(alps.score_heads(base, task, metric=METRICS))
    assert calls == [1, 1, 1, 2, 1, 3, 3]
    assert all(torch.equal(found[0][name].tensor, other[name].tensor) for other in found[1:] for name in METRICS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree(tmp_path):
    base, task = llama(), moved(llama())
    base.save_pretrained(tmp_path / "base")
    expected = alps.score_heads(base, task, metric=METRICS)
    on_gpu = copy.deepcopy(base).cuda(), copy.deepcopy(task).cuda()
    for first, second, options in ((base, task, {"device": "cuda"}), (*on_gpu, {}), (on_gpu[0], task, {}),
                                   (tmp_path / "base", task, {"device": "cuda"}), (*on_gpu, {"device": "cpu"})):
        found = alps.score_heads(first, second, metric=METRICS, **options)
        for name in METRICS:
            assert torch.allclose(found[name].tensor, expected[name].tensor, rtol=1.5e-5, atol=0), (name, options)


def test_models_are_left_alone():
    base, task = llama(), moved(llama())
    before = [copy.deepcopy(model.state_dict()) for model in (base, task)]
    alps.score_heads(base, task, metric=METRICS)
    for model, state in zip((base, task), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(param.requires_grad and param.grad is None for param in model.parameters())


@pytest.mark.parametrize("kinds", [(BertModel, BertForMaskedLM), (BertForMaskedLM, BertForSequenceClassification),
                                   (BertForSequenceClassification, BertModel)])
def test_head_modules_and_prefixes_may_differ(kinds):
    base, task = bert(kinds[0]), moved(bert(kinds[1]))
    with torch.no_grad():  # the classes draw different numbers: give both the same attention
        for (_, a), (_, b) in zip(base.base_model.encoder.named_parameters(), task.base_model.encoder.named_parameters(),
                                  strict=True):
            a.copy_(b)
    task.base_model.encoder.layer[1].attention.self.query.weight.data[8:16] += 0.1
    scores = alps.score_heads(base, task, representation="q", metric="euclidean")
    assert {head for head in scores if scores[head]} == {(1, 1)}


def test_provenance():
    scores = alps.score_heads(llama().to(torch.bfloat16), moved(llama()))
    models = scores.provenance["models"]
    assert models["base"] == {"name": "LlamaForCausalLM", "model_type": "llama", "dtypes": ["bfloat16"], "streamed": False}
    assert models["task"]["dtypes"] == ["float32"]
    assert set(scores.provenance["versions"]) == {"alps_kernels", "torch", "transformers", "python"}
    assert scores.summary == alps.find_heads(llama()).summary()


def test_progress_shows_a_bar(capsys):
    alps.score_heads(llama(), moved(llama()), progress=True)
    assert "scoring" in capsys.readouterr().err


def test_stacked_views_and_copies():
    weight = torch.arange(60.0).view(12, 5)
    rows = [weight.narrow(0, start, 2) for start in (0, 3, 6, 9)]  # evenly spaced: a view
    view = stacked(rows)
    assert view.data_ptr() == weight.data_ptr() and torch.equal(view, torch.stack(rows))
    columns = [weight.t().narrow(0, start, 1) for start in (1, 3)]
    assert stacked(columns).data_ptr() == columns[0].data_ptr() and torch.equal(stacked(columns), torch.stack(columns))
    for uneven in ([rows[0], rows[1], rows[3]], [rows[2], rows[0]], [rows[0], rows[1].clone()]):
        assert torch.equal(stacked(uneven), torch.stack(uneven))
    assert stacked([rows[1]]).shape == (1, 2, 5)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.fault("Bad input", "options of score_heads that cannot be")
@pytest.mark.parametrize("options, message", [
    ({"metric": "emd"}, "metric is 'emd'.*pad_values"),
    ({"metric": ("pad", "emd")}, "metric is 'emd'"),
    ({"metric": ()}, "expected one metric or several"),
    ({"metric": ("pad", "pad")}, "several different"),
    ({"representation": "qk"}, "representation is 'qk'.*projection"),
    ({"temperature": 0}, "temperature is 0; expected a positive number"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "1"}, "temperature is '1'"),
    ({"device": "abacus"}, "cannot compute on device 'abacus'"),
    ({"attention": "cross"}, "no attention called 'cross'"),
    ({"attention": [7]}, r"layers \[7\]"),
])
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        alps.score_heads(llama(), moved(llama()), **options)


def test_same_object_and_other_types():
    model = llama()
    with pytest.raises(ValueError, match="same object"):
        alps.score_heads(model, model)
    with pytest.raises(TypeError, match="task is a OrderedDict; expected a model"):
        alps.score_heads(model, model.state_dict())


@pytest.mark.fault("Bad input", "models with other heads, groups, sizes or layers: the first difference is named")
@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 3}, "has 2 attention layers and LlamaForCausalLM 3"),
    ({"num_attention_heads": 4}, "has 6 query heads, LlamaForCausalLM has 4"),
    ({"num_key_value_heads": 3}, "has 2 key/value groups, LlamaForCausalLM has 3"),
    ({"hidden_size": 48}, r"k_proj.weight is \[16, 36\] in .* and \[16, 48\] in"),
    ({"attention_bias": False}, "has no model.layers.0.self_attn.k_proj.bias"),
])
def test_other_architectures_are_refused(changes, message):
    with pytest.raises(LayoutError, match=message):
        alps.score_heads(llama(), llama(**changes))


def test_other_model_types_are_refused():
    from transformers import MistralConfig, MistralModel

    config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(LayoutError, match="LlamaModel is a llama and MistralModel a mistral"):
        alps.score_heads(LlamaModel(config), MistralModel(MistralConfig(**{
            key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                  "num_attention_heads", "num_key_value_heads")})))


@pytest.mark.fault("Bad input", "NaN and infinite weights of either model: tensor and count are named")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["base", "task"])
def test_non_finite_weights_are_named(which, value):
    models = {"base": llama(), "task": moved(llama())}
    models[which].model.layers[1].self_attn.v_proj.weight.data[3, 3] = value
    with pytest.raises(ValueError, match=f"model.layers.1.self_attn.v_proj.weight of the {which} model.* 1 NaN or inf"):
        alps.score_heads(**models, representation="qkv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alps.score_heads(**models, representation="q")  # what is not compared is not read


def test_meta_and_packed_weights_are_refused():
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    with pytest.raises(ValueError, match="k_proj.weight is on the meta device"):
        alps.score_heads(llama(), empty)
    packed = llama()
    packed.model.layers[0].self_attn.q_proj.weight = nn.Parameter(torch.zeros(48, 36, dtype=torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match="layers.0.self_attn.q_proj.*int8"):
        alps.score_heads(llama(), packed)


def test_adapters_must_be_merged():
    class Lora(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.lora_A = base_layer, nn.Linear(36, 2, bias=False)

    task = moved(llama())
    task.model.layers[0].self_attn.q_proj = Lora(task.model.layers[0].self_attn.q_proj)
    with pytest.raises(LayoutError, match="q_proj.base_layer.*merge the adapters first"):
        alps.score_heads(llama(), task)


def test_shapes_that_do_not_multiply_suggest_qkv(monkeypatch):
    from types import SimpleNamespace as Stub

    from alps_kernels.scoring.representations import check_projection

    segments = [Stub(base=torch.empty(2, *shape)) for shape in ((16, 40), (8, 40), (8, 40))]
    with pytest.raises(LayoutError, match="attn.*q \\[16, 40\\].*use representation='qkv'"):
        check_projection(Stub(module="attn"), segments)


# -- real models -----------------------------------------------------------------------------


@pytest.mark.real
def test_minilm_equals_the_released_definition():
    base = BertModel.from_pretrained(real_models.minilm())
    task = moved(base, 1e-3)
    scores = alps.score_heads(base, task, representation="qkv")
    assert scores.heads_per_layer == (12,) * 6
    for layer, head in ((0, 0), (2, 7), (5, 11)):
        expected = released(*(flat(model, layer, head, "qkv") for model in (base, task)))
        assert scores[layer, head] == pytest.approx(expected, rel=1e-6)


@pytest.mark.real
def test_real_conv1d():
    base = GPT2LMHeadModel.from_pretrained(real_models.microformer())
    task = moved(base, 1e-3)
    scores = alps.score_heads(base, task, representation="qkv")
    assert scores.heads_per_layer == (8,) * 8
    weight = base.transformer.h[3].attn.c_attn.weight.detach(), task.transformer.h[3].attn.c_attn.weight.detach()
    by_hand = [torch.cat([w[:, part * 256 + 160:part * 256 + 192].t().flatten() for part in range(3)]) for w in weight]
    assert scores[3, 5] == pytest.approx(released(*by_hand), rel=1e-6)


@pytest.mark.real
@pytest.mark.slow
def test_real_grouped_heads():
    base = LlamaForCausalLM.from_pretrained(real_models.smollm2())
    task = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (4, 17):
            task.model.layers[layer].self_attn.k_proj.weight[64:128] *= 1.01  # group 1 of 3: heads 3, 4, 5 of 9
    scores = alps.score_heads(base, task, representation="qkv", metric=("pad", "euclidean"))
    assert len(scores["pad"]) == 270
    expected = {(layer, head) for layer in (4, 17) for head in (3, 4, 5)}
    for name in scores:
        assert {head for head in scores[name] if scores[name][head] > 0} == expected
    by_hand = [torch.cat([p[4 * 64:5 * 64].flatten(), k[64:128].flatten(), v[64:128].flatten()])
               for m in (base, task) for a in [m.model.layers[17].self_attn]
               for p, k, v in [(a.q_proj.weight.detach(), a.k_proj.weight.detach(), a.v_proj.weight.detach())]]
    assert scores["pad"][17, 4] == pytest.approx(released(*by_hand), rel=1e-6)
    assert set(scores["pad"].top(k=6)) == expected


def test_every_representation_has_scores():
    for representation in REPRESENTATIONS:
        assert (alps.score_heads(llama(), moved(llama()), representation=representation).tensor > 0).all()
