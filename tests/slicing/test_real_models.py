"""Real models: a sliced step is a masked step of the plain model, and costs what the slices cost."""

import copy

import pytest
import torch
from transformers import AlbertForMaskedLM, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

import alps_kernels as alps
from alps_kernels.tensors import synced_slices_in

from ..optim.cases import same_bytes
from ..support.real_models import microformer, minilm, rxnmapper, smollm2

pytestmark = pytest.mark.real


def smollm():
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model.model.layers = model.model.layers[:5]  # five of thirty: the test's time, not the model's shape
    return model


REAL = {
    "SmolLM2": smollm,
    "GPT-2 (microformer)": lambda: GPT2LMHeadModel.from_pretrained(microformer()),
    "ALBERT (rxnmapper)": lambda: AlbertForMaskedLM.from_pretrained(rxnmapper()),
    "BERT (MiniLM)": lambda: AutoModel.from_pretrained(minilm()),
}


def score(model, seed=0):
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(seed))
    out = model(input_ids=ids)
    values = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return values.float().tanh().square().mean()


@pytest.mark.parametrize("name", REAL)
def test_a_tenth_of_the_heads_of_a_real_model(name):
    plain = REAL[name]().eval()
    layout = alps.find_heads(plain)
    heads = alps.HeadSelection.random(layout, 0.1, seed=1, parts=("q", "k", "v", "o"))
    sliced = copy.deepcopy(plain)
    bound = alps.slice_heads(sliced, heads)
    full = heads.freeze(plain)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    assert torch.equal(score(plain), score(sliced))
    for model, what in ((plain, full), (sliced, bound)):
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-3, weight_decay=0.1, heads=what)
        for step in range(2):
            optimizer.zero_grad()
            score(model, step).backward()
            optimizer.step()
    parts = {part.name: part for part in full.params}
    for key, value in sliced.state_dict().items():
        outside = torch.ones_like(value, dtype=torch.bool)
        if key in parts:
            for block in parts[key].blocks(outside):
                block.fill_(False)
            assert not torch.equal(value, before[key])
        assert same_bytes(value[outside], before[key][outside]), key
    with torch.no_grad():
        torch.testing.assert_close(score(sliced, 7), score(plain, 7), rtol=1e-3, atol=1e-6)
    grown = sum(part.param.grad.numel() for part in bound.params)
    assert grown == bound.numel == full.numel == sum(p.numel() for p in sliced.parameters() if p.requires_grad)
    out = score(sliced, 7)
    alps.unslice_heads(sliced)
    assert torch.equal(score(sliced, 7), out)


def saved_bytes(model, ids):
    """Bytes of distinct storages that autograd keeps for backward, weights aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, held = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    return sum(kept.values()), loss


def test_saved_bytes_are_at_most_loras_and_gradients_are_the_slices():
    peft = pytest.importorskip("peft")
    ids = torch.randint(5, 100, (2, 64))
    plain = smollm().train()
    heads = alps.HeadSelection.random(alps.find_heads(plain), 0.1, seed=1)
    masked, sliced = copy.deepcopy(plain), copy.deepcopy(plain)
    heads.freeze(masked)
    bound = alps.slice_heads(sliced, heads)
    adapted = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=128, target_modules=["q_proj", "k_proj", "v_proj"]))
    bytes_of, grads_of = {}, {}
    for name, model in (("full", plain), ("masked", masked), ("sliced", sliced), ("lora", adapted)):
        bytes_of[name], loss = saved_bytes(model, ids)
        loss.backward()
        grads_of[name] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert bytes_of["sliced"] <= bytes_of["masked"] and bytes_of["sliced"] < bytes_of["lora"] < bytes_of["full"]
    assert grads_of["sliced"] == 4 * bound.numel < grads_of["masked"] < grads_of["full"]
    assert grads_of["sliced"] < grads_of["lora"] and list(synced_slices_in(sliced))
