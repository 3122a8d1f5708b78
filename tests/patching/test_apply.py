"""Head patches on models in memory: exact, all or nothing, several at once."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertForMaskedLM, GPT2LMHeadModel

import alps_kernels as alps
from alps_kernels import HeadPatch, apply_patch, revert_patch, save_patch
from alps_kernels.patching import applied, applied_patches
from alps_kernels.selection import remember, selection_of
from alps_kernels.tensors import synced_slices_in
from tests.support import real_models

from .cases import MODELS, build, logits, pick, pointers, same_bytes, snapshot, tune

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cycle(base, tuned, path, known=None):
    """Save, apply to the base, revert: every byte of both models is checked."""
    before, after = snapshot(base), snapshot(tuned)
    made = save_patch(tuned, path, base=known)
    where = pointers(base)
    assert apply_patch(base, path) == (path.stem,)
    assert same_bytes(base, after) and not same_bytes(base, before)
    assert revert_patch(base) == ()
    assert same_bytes(base, before) and pointers(base) == where
    assert same_bytes(tuned, after)
    return made


# -- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, dtype, tmp_path):
    base = build(name, dtype)
    heads = pick(base)
    tuned = tune(base, heads)
    made = cycle(base, tuned, tmp_path / "p.safetensors")
    assert made.base is None and made.numel == heads.bind(base).numel
    assert cycle(base, tuned, tmp_path / "p.safetensors", known=base).base is not None


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_smollm2(dtype, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(real_models.smollm2(), dtype=dtype)
    tuned = tune(base, alps.HeadSelection.random(alps.find_heads(base), 0.1), scale=1e-3)
    made = cycle(base, tuned, tmp_path / "p.safetensors")
    assert len(made.selection) == 27 and made.fingerprint == save_patch(base, tmp_path / "b.safetensors", made.selection).fingerprint
    # What is written is the slices and a header of names and digests.
    assert made.nbytes < (tmp_path / "p.safetensors").stat().st_size < made.nbytes + 80_000


@pytest.mark.real
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_of_real_bert_and_gpt2(dtype, tmp_path):
    for base in (BertForMaskedLM.from_pretrained(real_models.rxnfp("bert_pretrained"), dtype=dtype),
                 GPT2LMHeadModel.from_pretrained(real_models.microformer(), dtype=dtype)):
        heads = alps.HeadSelection.random(alps.find_heads(base), 0.1, parts=("q", "k", "v", "o"))
        cycle(base, tune(base, heads, scale=1e-3), tmp_path / "p.safetensors", known=base)


def test_bytes_that_are_no_numbers_travel_too(tmp_path):
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    weight = tuned.model.layers[0].self_attn.q_proj.weight.data
    weight[8:16].view(torch.int16)[0, :4] = torch.tensor([0x7FC1, -1, 0x7F80, -32768], dtype=torch.int16)  # NaNs, inf, -0
    cycle(base, tuned, tmp_path / "p.safetensors")


@pytest.mark.parametrize("heads, kv", [((), "any"), (((0, 0), (0, 1)), "all"), (((0, 1),), "all"), (((1, 2),), "none")])
def test_policies_and_no_heads(heads, kv, tmp_path):
    base = build()
    selection = pick(base, heads, kv=kv)
    tuned = tune(base, selection)
    made = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    assert made.numel == selection.bind(base).numel
    apply_patch(base, tmp_path / "p.safetensors")
    assert same_bytes(base, snapshot(tuned))


def test_a_trained_model(tmp_path):
    base = build()
    heads = pick(base)
    model = copy.deepcopy(base)
    heads.freeze(model)
    optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=heads.bind(model))
    for _ in range(3):
        model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()
    made = cycle(base, model, tmp_path / "p.safetensors", known=base)
    assert made.selection == heads


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_wrappers_are_seen_through(wrap, tmp_path):
    base = build()
    tuned = tune(base, pick(base))
    before = snapshot(base)
    save_patch(wrap(tuned), tmp_path / "p.safetensors")
    wrapped = wrap(base)
    apply_patch(wrapped, tmp_path / "p.safetensors")
    assert same_bytes(base, snapshot(tuned)) and selection_of(wrapped) == selection_of(base) == pick(base)
    revert_patch(base)
    assert same_bytes(base, before)


def test_layers_compiled_one_by_one(tmp_path):
    base = build()
    tuned = tune(base, pick(base))
    save_patch(tuned, tmp_path / "p.safetensors")
    base.model.layers[0] = torch.compile(base.model.layers[0])
    apply_patch(base, tmp_path / "p.safetensors")
    for (_, ours), (_, theirs) in zip(base.named_parameters(), tuned.named_parameters(), strict=True):
        assert torch.equal(ours, theirs)
    save_patch(tuned, tmp_path / "q.safetensors")
    with pytest.raises(ValueError, match="overlaps with 'p'"):
        apply_patch(base, tmp_path / "q.safetensors")


# -- sliced models ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_sliced_models(name, dtype, tmp_path):
    """Leaf and full weight both take the patch; a trained leaf is what is saved."""
    base = build(name, dtype)
    heads = pick(base)
    tuned = tune(base, heads)
    made = save_patch(tuned, tmp_path / "p.safetensors", base=base)
    model, before = copy.deepcopy(base), snapshot(base)
    alps.slice_heads(model, heads)
    apply_patch(model, tmp_path / "p.safetensors")
    assert same_bytes(model, snapshot(tuned)) and torch.equal(logits(model), logits(tuned)) and leaves_agree(model)
    again = save_patch(model, tmp_path / "again.safetensors", base=base)
    assert all(torch.equal(again.values[key], value) for key, value in made.values.items()) and again.base == made.base
    revert_patch(model)
    assert same_bytes(model, before) and torch.equal(logits(model), logits(base)) and leaves_agree(model)


def leaves_agree(model):
    return all(torch.equal(mirror.leaf, mirror.cut(mirror.weight)) for _, mirror in synced_slices_in(model))


def test_a_patch_of_other_heads_on_a_sliced_model(tmp_path):
    base = build()
    tuned = tune(base, pick(base, ((0, 0), (1, 2))))
    save_patch(tuned, tmp_path / "p.safetensors")
    alps.slice_heads(base, pick(base, ((0, 1), (1, 2))))
    before = snapshot(base)
    apply_patch(base, tmp_path / "p.safetensors")
    assert same_bytes(base, snapshot(tuned)) and leaves_agree(base)
    revert_patch(base)
    assert same_bytes(base, before) and leaves_agree(base)


def test_training_a_sliced_model_after_a_patch(tmp_path):
    """The patch is where training starts, and what training made is what is saved."""
    base = build()
    heads = pick(base)
    save_patch(tune(base, heads), tmp_path / "p.safetensors")
    models = [copy.deepcopy(base) for _ in range(2)]
    alps.slice_heads(models[0], heads)
    for model in models:
        apply_patch(model, tmp_path / "p.safetensors")
        heads.freeze(model) if model is models[1] else None
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, heads=heads.bind(model))
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
            optimizer.step()
    sliced, whole = (save_patch(model, tmp_path / "q.safetensors", heads, base=base) for model in models)
    assert all(torch.allclose(sliced.values[key], value, atol=1e-6) for key, value in whole.values.items())
    moved = HeadPatch.load(tmp_path / "p.safetensors").values
    assert any(not torch.equal(moved[key], value) for key, value in sliced.values.items())


def test_a_model_of_inference_mode(tmp_path):
    base = build()
    tuned = tune(base, pick(base))
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    with torch.inference_mode():
        model = build()
    before = snapshot(model)
    apply_patch(model, tmp_path / "p.safetensors")
    assert same_bytes(model, snapshot(tuned))
    revert_patch(model)
    assert same_bytes(model, before)
    with torch.inference_mode():
        apply_patch(base, tmp_path / "p.safetensors")
        assert same_bytes(base, snapshot(tuned))
    revert_patch(base)
    assert same_bytes(base, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spread", [False, True], ids=["one device", "two devices"])
def test_on_a_gpu(spread, tmp_path):
    """A patch made on the CPU fits the same bytes on a GPU, and one made there is the same file."""
    base = build(dtype=torch.bfloat16)
    tuned = tune(base, pick(base))
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    model = copy.deepcopy(base)
    (model.model.layers[1] if spread else model).cuda()
    before, where = snapshot(model), pointers(model)
    apply_patch(model, HeadPatch.load(tmp_path / "p.safetensors").to("cuda"))
    assert same_bytes(copy.deepcopy(model).cpu(), snapshot(tuned)) and pointers(model) == where
    save_patch(model, tmp_path / "q.safetensors", base=base)
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    revert_patch(model)
    assert same_bytes(model, before)


# -- several patches -------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path):
    """A base; patches a and b on separate heads, c on a head of a; the tuned models."""
    base = build(dtype=torch.bfloat16)
    tuned = {}
    for seed, (name, heads) in enumerate({"a": ((0, 0), (0, 1)), "b": ((0, 2), (1, 3)), "c": ((0, 1), (1, 0))}.items()):
        tuned[name] = tune(base, pick(base, heads), seed=seed)
        save_patch(tuned[name], tmp_path / f"{name}.safetensors", base=base)
    return base, tuned, tmp_path


def test_patches_on_separate_heads_are_on_a_model_together(three):
    base, tuned, folder = three
    before = snapshot(base)
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    assert apply_patch(base, files) == ("a", "b") == applied_patches(base)
    both = snapshot(base)
    assert selection_of(base) == pick(base, ((0, 0), (0, 1), (0, 2), (1, 3)))
    for name, value in both.items():
        for one in (tuned["a"], tuned["b"]):  # every changed byte is that of the patch which changed it
            theirs = one.state_dict()[name]
            moved = theirs != before[name]
            assert torch.equal(value[moved], theirs[moved])
    assert revert_patch(base, "a") == ("b",)
    assert same_bytes(base, snapshot(tuned["b"])) and selection_of(base) == pick(base, ((0, 2), (1, 3)))
    apply_patch(base, files[0])
    assert same_bytes(base, both)
    revert_patch(base, ["b"])
    assert same_bytes(base, snapshot(tuned["a"]))
    revert_patch(base)
    assert same_bytes(base, before)


@pytest.mark.parametrize("heads, message", [
    (((0, 1), (1, 0)), r"'d' overlaps with 'a': both hold head \(0, 1\)"),
    (((0, 0),), r"both hold head \(0, 0\)")])
def test_overlap_is_refused_by_name(three, heads, message):
    base, _, folder = three
    save_patch(tune(base, pick(base, heads), seed=9), folder / "d.safetensors")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        apply_patch(base, [folder / "a.safetensors", folder / "d.safetensors"])
    assert same_bytes(base, before) and not applied_patches(base) and selection_of(base) is None
    apply_patch(base, folder / "a.safetensors")
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        apply_patch(base, folder / "d.safetensors")
    assert same_bytes(base, before) and applied_patches(base) == ("a",)


def test_a_shared_key_value_group_is_an_overlap(tmp_path):
    base = build()
    for name, head in (("a", 0), ("b", 1)):
        save_patch(tune(base, pick(base, ((0, head),)), seed=head), tmp_path / f"{name}.safetensors")
        save_patch(tune(base, pick(base, ((0, head),), kv="none"), seed=head), tmp_path / f"{name}-q.safetensors")
    with pytest.raises(ValueError, match=r"heads \[1\] and \[0\] of layer 0 share key/value groups.*k_proj"):
        apply_patch(base, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert apply_patch(base, [tmp_path / "a-q.safetensors", tmp_path / "b-q.safetensors"]) == ("a-q", "b-q")


def test_hot_swap_allocates_no_weight(three):
    base, tuned, folder = three
    before, where = snapshot(base), pointers(base)
    patches = {name: HeadPatch.load(folder / f"{name}.safetensors") for name in tuned}
    for name in ("a", "c", "b", "a", "c"):
        assert apply_patch(base, patches[name], replace=True, verify=name != "b") == (name,)
        assert same_bytes(base, snapshot(tuned[name])) and pointers(base) == where
        assert selection_of(base) == patches[name].selection
    revert_patch(base)
    assert same_bytes(base, before) and pointers(base) == where


def test_what_is_remembered_of_the_model(three):
    base, _, folder = three
    first = pick(base, ((0, 3),))
    first.freeze(base)
    remember(base, (first, "trainable"))
    apply_patch(base, folder / "a.safetensors")
    assert selection_of(base) == pick(base, ((0, 0), (0, 1)))
    revert_patch(base)
    assert selection_of(base) == first and first.bind(base).rest == "trainable"
    apply_patch(base, folder / "a.safetensors")
    later = pick(base, ((1, 1),))
    later.freeze(base)
    revert_patch(base)
    assert selection_of(base) == later
    apply_patch(base, folder / "a.safetensors")
    save_patch(tune(build(dtype=torch.bfloat16), pick(base, ((1, 3),), parts=("q",)), seed=4), folder / "q.safetensors")
    apply_patch(base, folder / "q.safetensors")
    assert selection_of(base) is None  # no one selection is both
    revert_patch(base, "q")
    assert selection_of(base) == pick(base, ((0, 0), (0, 1)))


def test_names(three):
    base, _, folder = three
    apply_patch(base, folder / "a.safetensors")
    with pytest.raises(ValueError, match="a patch called 'a' is already there"):
        apply_patch(base, folder / "a.safetensors")
    with pytest.raises(ValueError, match="no patch called 'z'.*there is \\['a'\\]"):
        revert_patch(base, "z")
    apply_patch(base, HeadPatch.load(folder / "b.safetensors", name="other"))
    assert applied_patches(base) == ("a", "other")
    assert revert_patch(base, folder / "a.safetensors") == ("other",) == apply_patch(base, [])
    apply_patch(base, folder / "a.safetensors")
    revert_patch(base)
    with pytest.raises(ValueError, match="no patch is on this model"):
        revert_patch(base)
    with pytest.raises(TypeError, match="int"):
        apply_patch(base, [3])
    with pytest.raises(TypeError, match="str"):
        apply_patch("model", folder / "a.safetensors")


def test_training_after_a_patch_is_reverted_too(three):
    base, _, folder = three
    before = snapshot(base)
    apply_patch(base, folder / "a.safetensors")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[:16] = float("nan")
    revert_patch(base)
    assert same_bytes(base, before)


def test_a_model_is_not_kept_alive(tmp_path):
    base = build()
    save_patch(tune(base, pick(base)), tmp_path / "p.safetensors")
    apply_patch(base, tmp_path / "p.safetensors")
    gone = weakref.ref(base)
    del base
    gc.collect()
    assert gone() is None


# -- refused before anything changes ---------------------------------------------------------


def refused(model, path, message, **options):
    before, remembered, on = snapshot(model), selection_of(model), applied_patches(model)
    with pytest.raises(ValueError, match=message):
        apply_patch(model, path, **options)
    assert same_bytes(model, before) and selection_of(model) == remembered and applied_patches(model) == on


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("name, place", [
    ("model.embed_tokens.weight", (3, 5)), ("model.norm.weight", (7,)), ("model.layers.1.mlp.up_proj.weight", (0, 0)),
    ("model.layers.0.self_attn.q_proj.weight", (7, 2)), ("model.layers.0.self_attn.o_proj.weight", (5, 16)),
    ("model.layers.1.self_attn.v_proj.weight", (15, 1)), ("lm_head.weight", (31, 23))])
@pytest.mark.fault("Bad input")
def test_one_bit_of_the_base(name, place, with_base, tmp_path):
    """one flipped bit of the base, beside the patched slices or far from them: the patch is refused by the parameter

    Heads (0, 1) and (1, 0) alone are selected: rows 7, columns 16 and group 1 lie beside them.
    """
    base = build(dtype=torch.bfloat16)
    save_patch(tune(base, pick(base, ((0, 1), (1, 0)))), tmp_path / "p.safetensors", base=base if with_base else None)
    dict(base.named_parameters())[name].data.view(torch.int16)[place] ^= 1
    refused(base, tmp_path / "p.safetensors", f"'p' does not fit LlamaForCausalLM: {name} is not the base's outside")


def test_slices_that_moved_are_seen_where_the_base_was_known(tmp_path):
    base = build()
    tuned = tune(base, pick(base))
    save_patch(tuned, tmp_path / "p.safetensors", base=base)
    refused(tuned, tmp_path / "p.safetensors", "not the base's where the patch would go")
    save_patch(tuned, tmp_path / "p.safetensors")
    apply_patch(tuned, tmp_path / "p.safetensors")


def test_other_models_and_dtypes(tmp_path):
    base = build()
    save_patch(tune(base, pick(base)), tmp_path / "p.safetensors")
    refused(build(dtype=torch.bfloat16), tmp_path / "p.safetensors", r"is float32 \[32, 24\] there and bfloat16 .* here.*not be exact")
    refused(build("qwen2 (bias)"), tmp_path / "p.safetensors", "it is of a llama, this is a qwen2")
    refused(build(num_hidden_layers=3), tmp_path / "p.safetensors", "model.layers.2.* is a parameter of this model only")
    refused(build(vocab_size=40), tmp_path / "p.safetensors", r"float32 \[32, 24\] there and float32 \[40, 24\] here")
    refused(build(num_attention_heads=2, num_key_value_heads=1, head_dim=16), tmp_path / "p.safetensors", "8 heads.*has 4")
    refused(build(num_attention_heads=4, num_key_value_heads=1, head_dim=8), tmp_path / "p.safetensors", "k_proj")
    refused(build(tie_word_embeddings=True), tmp_path / "p.safetensors", "lm_head.weight is a parameter of the base only")
    torch.manual_seed(5)
    refused(MODELS["llama"](), tmp_path / "p.safetensors", "is not the base's outside")
    apply_patch(MODELS["llama"](), tmp_path / "p.safetensors", verify=False)


def test_saving_is_refused(tmp_path):
    base = build()
    path = tmp_path / "p.safetensors"
    with pytest.raises(ValueError, match="nothing says which heads"):
        save_patch(base, path)
    with pytest.raises(TypeError, match="heads is a list"):
        save_patch(base, path, [(0, 1)])
    heads = pick(base)
    tuned = tune(base, heads)
    heads.freeze(tuned, rest="trainable")
    with pytest.raises(ValueError, match="rest='trainable'"):
        save_patch(tuned, path)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM differs from LlamaForCausalLM outside.*q_proj"):
        save_patch(tuned, path, pick(base, ((0, 1), (1, 0))), base=base)
    with pytest.raises(ValueError, match="8 heads in 2 layers.*this model has 24"):
        save_patch(build("t5 (cross)"), path, heads)
    with pytest.raises(ValueError, match="provenance is not JSON"):
        save_patch(tuned, path, heads, provenance={"a": object()})
    with pytest.raises(ValueError, match="is float32 .* in .* and float16"):
        save_patch(tuned.half(), path, heads, base=base)
    with pytest.raises(ValueError, match="meta device"):
        save_patch(build().to("meta"), path, heads)
    with pytest.raises(FileNotFoundError):
        save_patch(build(), tmp_path / "none" / "p.safetensors", heads)
    assert not list(tmp_path.iterdir())


def test_adapters_beside_the_weights_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    base = build()
    save_patch(tune(base, pick(base)), tmp_path / "p.safetensors")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(alps.LayoutError, match="merge the adapters first"):
        save_patch(model, tmp_path / "q.safetensors", pick(base))
    with pytest.raises(alps.LayoutError, match="merge the adapters first"):
        apply_patch(model, tmp_path / "p.safetensors")


def test_sharded_weights_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = build()
        heads, mesh = pick(model), init_device_mesh("cpu", (1,))
        mlp = model.model.layers[0].mlp.up_proj
        mlp.weight = nn.Parameter(distribute_tensor(mlp.weight.detach(), mesh))
        with pytest.raises(ValueError, match="layers.0.mlp.up_proj.weight is a .*DTensor.*sharded or packed"):
            save_patch(model, tmp_path / "p.safetensors", heads)
    finally:
        dist.destroy_process_group()


def test_a_model_that_was_cast_since_cannot_be_reverted(three):
    base, _, folder = three
    apply_patch(base, folder / "a.safetensors")
    base.float()
    before = snapshot(base)
    with pytest.raises(ValueError, match="q_proj.weight was bfloat16 .* when patch 'a' was applied and is float32"):
        revert_patch(base)
    assert same_bytes(base, before)
    base.bfloat16()
    revert_patch(base)


# -- all or nothing --------------------------------------------------------------------------


@pytest.mark.fault("All or nothing")
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("at", range(0, 16, 3))
@pytest.mark.parametrize("action", ["apply", "apply two", "swap", "revert"])
def test_an_error_between_two_writes(three, action, at, error, monkeypatch):
    """an error or interrupt between any two writes of a patch's apply, swap or revert: the model is as it was"""
    base, _, folder = three
    if action in ("swap", "revert"):
        apply_patch(base, folder / "a.safetensors")
    before, names, known = snapshot(base), applied_patches(base), selection_of(base)
    write, calls = applied._write, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == at + 1:
            raise error("planted")
        write(*arguments)

    monkeypatch.setattr(applied, "_write", failing)
    todo = {"apply": lambda: apply_patch(base, folder / "a.safetensors"), "revert": lambda: revert_patch(base),
            "apply two": lambda: apply_patch(base, [folder / "a.safetensors", folder / "b.safetensors"]),
            "swap": lambda: apply_patch(base, folder / "c.safetensors", replace=True)}[action]
    try:
        todo()
    except error:
        monkeypatch.undo()
        assert same_bytes(base, before) and applied_patches(base) == names and selection_of(base) == known
        todo()
    else:
        assert len(calls) <= at
    monkeypatch.undo()
    if applied_patches(base):
        revert_patch(base)
    assert same_bytes(base, snapshot(build(dtype=torch.bfloat16)))


def test_an_interrupt_while_bookkeeping_or_rolling_back(three, monkeypatch):
    base, _, folder = three
    before, register, write, calls = snapshot(base), applied._register, applied._write, []

    def failing_register(*arguments):
        calls.append("register")
        if len(calls) == 1:
            raise KeyboardInterrupt
        register(*arguments)

    def failing_write(*arguments):
        write(*arguments)
        if calls and len(calls) < 4:
            calls.append("write")
            raise KeyboardInterrupt

    monkeypatch.setattr(applied, "_register", failing_register)
    monkeypatch.setattr(applied, "_write", failing_write)
    with pytest.raises(KeyboardInterrupt):
        apply_patch(base, folder / "a.safetensors")
    assert same_bytes(base, before) and not applied_patches(base) and selection_of(base) is None


def test_a_patch_changes_what_the_model_says(three):
    base, tuned, folder = three
    plain = logits(base)
    apply_patch(base, folder / "a.safetensors")
    assert torch.equal(logits(base), logits(tuned["a"])) and not torch.equal(logits(base), plain)
    revert_patch(base)
    assert torch.equal(logits(base), plain)
