"""Patches in forms that others take: PEFT loads the LoRA, transformers the checkpoint, a server the sparse update."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertForMaskedLM, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

import alps_kernels as alps
from alps_kernels import export_lora, export_merged, export_sparse, save_patch
from alps_kernels.patching.export import LoraExport, LoraModule
from tests.support import real_models

from .cases import MODELS, build, logits, pick, same_bytes, snapshot, tune

peft = pytest.importorskip("peft")
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def adapted(base, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def differences(base, tuned):
    return {name: (tuned.state_dict()[name].double() - value.double()) for name, value in base.state_dict().items()
            if not torch.equal(tuned.state_dict()[name], value)}


def products(folder, config):
    """B A of every module, in the orientation of its stored weight, float64."""
    held = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, a in held.items():
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = held[key.replace("lora_A", "lora_B")].double() @ a.double()
            found[name + ".weight"] = product.t() if config["fan_in_fan_out"] else product
        elif key.endswith("lora_B.bias") and held[key].any():
            found[key.removeprefix("base_model.model.").replace(".lora_B.bias", ".bias")] = held[key].double()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", ["qkv", "qkvo"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_exact_lora(name, parts, dtype, tmp_path):
    base = build(name, dtype)
    heads = pick(base, parts=tuple(parts))
    tuned = tune(base, heads)
    patch = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    made = export_lora(tmp_path / "p.safetensors", base, tmp_path / "lora")
    assert made.error == 0 and all(module.exact for module in made.modules.values())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == ("Conv1D" in name)
    # B A is the difference: exact for 16-bit weights, rounded once for float32; nothing elsewhere.
    wanted, found = differences(base, tuned), products(tmp_path / "lora", config)
    assert found.keys() == wanted.keys()
    for key, difference in wanted.items():
        exact = difference if dtype != torch.float32 else difference.float().double()
        assert torch.equal(found[key], exact), key
    for key, cut in patch.cuts.items():
        if key.endswith("weight"):
            rank = made.modules[key.removesuffix(".weight")].rank
            assert rank == min(cut.stored[0] if cut.dim == 0 else cut.stored[1], cut.matrix[1 - cut.dim])
    model = adapted(base, tmp_path / "lora")
    assert any("lora_A" in key for key in model.state_dict())
    theirs, ours, plain = logits(model).double(), logits(tuned).double(), logits(base).double()
    # A rounding to this dtype of each projection's output, carried through two layers.
    assert (theirs - ours).abs().max() <= 64 * EPS[dtype] * ours.abs().max()
    # In float64 nothing but the one rounding of float32 differences is left.
    theirs, ours, plain = (logits(m.double()) for m in (model, tuned, base))
    bound = (1e-5 if dtype == torch.float32 else 1e-10) * ours.abs().max()
    assert (theirs - ours).abs().max() <= bound < 1e-2 * (plain - ours).abs().max()


@pytest.mark.parametrize("name", ["llama", "qwen2 (bias)", "gpt2 (Conv1D)", "phi3 (fused)", "bert"])
def test_merging_the_lora_gives_the_tuned_weights(name, tmp_path):
    base = build(name)
    tuned = tune(base, pick(base, parts=("q", "k", "v")))
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    export_lora(tmp_path / "p.safetensors", base, tmp_path / "lora")
    merged = adapted(base, tmp_path / "lora").merge_and_unload()
    for (key, ours), theirs in zip(merged.state_dict().items(), tuned.state_dict().values(), strict=True):
        # base + (tuned - base) in float32: two roundings
        assert (ours - theirs).abs().max() <= 2 * EPS[torch.float32] * theirs.abs().max(), key


@pytest.mark.parametrize("name", ["llama", "gpt2 (Conv1D)"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_svd_of_a_given_rank_states_its_error(name, rank, tmp_path):
    base = build(name)
    heads = pick(base)
    tuned = tune(base, heads)
    patch = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    made = export_lora(patch, base, tmp_path / "lora", rank=rank)
    found = products(tmp_path / "lora", json.loads((tmp_path / "lora" / "adapter_config.json").read_text()))
    for key, difference in differences(base, tuned).items():
        if key.endswith("bias"):
            continue
        module = made.modules[key.removesuffix(".weight")]
        left = difference - found[key]
        best = torch.linalg.svdvals(difference)[rank:].norm() / difference.norm()
        assert module.rank == rank and not module.exact and 0 < module.error < 1
        assert module.error == pytest.approx(float(left.norm() / difference.norm()), rel=1e-5)
        assert module.error == pytest.approx(float(best), rel=1e-5)
        cut = patch.cuts[key]
        assert all(not rest.any() for rest in cut.rest(found[key].contiguous()))
    assert made.error == max(module.error for module in made.modules.values())
    assert f"{made.error:.3g}" in str(made)
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["alps_kernels.lora"])
    assert said["modules"] == {key: vars(module) for key, module in made.modules.items()} and said["fingerprint"] == patch.fingerprint
    assert export_lora(patch, base, tmp_path / "all", rank=24).modules == export_lora(patch, base, tmp_path / "all2").modules
    ours, theirs, plain = logits(tuned), logits(adapted(base, tmp_path / "lora")), logits(base)
    assert not torch.equal(theirs, plain) and (theirs - ours).norm() < (plain - ours).norm()


@pytest.mark.real
def test_lora_of_smollm2(tmp_path):
    folder = real_models.smollm2()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = tune(base, alps.HeadSelection.random(alps.find_heads(base), 0.1), scale=1e-3)
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    made = export_lora(tmp_path / "p.safetensors", folder, tmp_path / "lora")
    assert {module.rank for module in made.modules.values()} <= {64, 128, 192}
    ids = torch.arange(100, 130)[None]
    with torch.no_grad():
        ours, plain = tuned(ids).logits, base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()(ids).logits
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max() < 0.1 * (plain - ours).abs().max()


@pytest.mark.real
@pytest.mark.parametrize("which", ["bert", "gpt2"])
def test_lora_of_real_bert_and_gpt2(which, tmp_path):
    base = (BertForMaskedLM.from_pretrained(real_models.rxnfp("bert_pretrained")) if which == "bert" else
            GPT2LMHeadModel.from_pretrained(real_models.microformer())).eval()
    heads = alps.HeadSelection.random(alps.find_heads(base), 0.1, parts=("q", "k", "v", "o"))
    tuned = tune(base, heads, scale=1e-2)
    patch = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    export_lora(patch, base, tmp_path / "lora")
    ours, plain, theirs = logits(tuned), logits(base), logits(adapted(base, tmp_path / "lora"))
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max() and (theirs - ours).norm() < 1e-3 * (plain - ours).norm()


@pytest.mark.parametrize("name", ["llama", "gpt2 (Conv1D)"])
def test_lora_of_a_sliced_base(name, tmp_path):
    base = build(name)
    heads = pick(base)
    patch = save_patch(tune(base, heads), tmp_path / "p.safetensors", base=base)
    expected = export_lora(patch, base, tmp_path / "lora")
    alps.slice_heads(base, heads)
    assert export_lora(patch, base, tmp_path / "sliced") == expected
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "sliced"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = ((tmp_path / name / "adapter_config.json").read_text() for name in ("lora", "sliced"))
    assert ours == theirs


def test_lora_is_refused(tmp_path):
    base = build()
    patch = save_patch(tune(base, pick(base)), tmp_path / "p.safetensors", base=base)
    for rank in (0, -1, True, 1.5, "4"):
        with pytest.raises(ValueError, match="rank is"):
            export_lora(patch, base, tmp_path / "lora", rank=rank)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(FileExistsError, match="already there"):
        export_lora(patch, base, tmp_path / "there")
    with pytest.raises(ValueError, match="does not fit"):
        export_lora(patch, build(dtype=torch.bfloat16), tmp_path / "lora")
    with pytest.raises(ValueError, match="holds no weights"):
        export_lora(save_patch(base, tmp_path / "e.safetensors", pick(base, ())), base, tmp_path / "lora")
    torch.manual_seed(0)
    xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=32, d_model=24, n_layer=2, n_head=4, d_inner=16))
    other = save_patch(tune(xlnet, pick(xlnet)), tmp_path / "x.safetensors", base=xlnet)
    with pytest.raises(ValueError, match=r"rel_attn.q of patch 'x' is held by a XLNetRelativeAttention.*no form"):
        export_lora(other, xlnet, tmp_path / "lora")
    tuned = tune(base, pick(base))
    tuned.model.layers[0].self_attn.q_proj.weight.data[8] = float("nan")
    with pytest.raises(ValueError, match="q_proj.weight: .*not finite"):
        export_lora(save_patch(tuned, tmp_path / "n.safetensors", base=base), base, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_module_in_words():
    assert "2 modules" in str(LoraExport({"a": LoraModule(2, True, 0.0), "b": LoraModule(1, False, 0.5)}, 10))


def test_merged(tmp_path):
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    export_merged((path for path in [tmp_path / "p.safetensors"]), tmp_path / "base", tmp_path / "merged")
    assert same_bytes(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"), snapshot(tuned))
    assert not (tmp_path / "merged" / "alps_patch").exists()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*transformers converts some weights")
def test_sparse(name, tmp_path):
    """A server that knows nothing of heads: it writes rows and columns of stored tensors."""
    base = build(name, torch.bfloat16)
    tuned = tune(base, pick(base))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    index = export_sparse(tmp_path / "p.safetensors", tmp_path / "base", tmp_path / "sparse")
    assert index == json.loads((tmp_path / "sparse" / "sparse_update.index.json").read_text())
    served = load_file(tmp_path / "base" / "model.safetensors")
    values = load_file(tmp_path / "sparse" / "sparse_update.safetensors")
    assert values.keys() == index["tensors"].keys() <= served.keys()
    for key, entry in index["tensors"].items():
        assert list(served[key].shape) == entry["shape"] and str(served[key].dtype) == f"torch.{entry['dtype']}"
        at, target = 0, served[key].view(entry["shape"][0], -1)
        for start, stop in entry["ranges"]:
            target.narrow(entry["dim"], start, stop - start).copy_(values[key].narrow(entry["dim"], at, stop - start))
            at += stop - start
        assert at == values[key].shape[entry["dim"]]
    wanted = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(served[key], value) for key, value in wanted.items())


def test_sparse_takes_the_names_of_the_checkpoint(tmp_path):
    from ..weights.test_checkpoints import to_bin

    base = build("bert")
    base.save_pretrained(tmp_path / "base")
    patch = save_patch(tune(base, pick(base)), tmp_path / "p.safetensors", base=base)
    to_bin(tmp_path / "base", prefix="outer.")
    index = export_sparse(patch, tmp_path / "base", tmp_path / "sparse")
    assert set(index["tensors"]) == {"outer." + name for name in patch.cuts}
    assert index["about"]["patches"][0]["heads"] == [[0, 1], [1, 0], [1, 3]]
