"""Training sliced heads on a GPU. Skipped without CUDA; see cases.py.

`sanitizer` in a name: small enough for compute-sanitizer.
"""

import copy

import pytest
import torch

import alps_kernels as alps
from alps_kernels.slicing import head_grad, oracle
from alps_kernels.tensors import synced_slice_of, synced_slices_in
from tests.gpu import cases
from tests.gpu.cases import outside
from tests.slicing.cases import batch, cut_grads, grads, pair
from tests.slicing.test_slice_heads import toy

pytestmark = cases.MARKS
SCATTERED = ((0, 64), (128, 192), (320, 384))


def there(model_type="llama", dtype=torch.float32):
    """A plain model, its heads, a sliced copy and its leaves, on the device."""
    plain, heads, _, _ = pair(model_type, dtype)
    plain.to(cases.DEVICE)  # eval: no dropout
    sliced = copy.deepcopy(plain)
    return plain, heads, sliced, alps.slice_heads(sliced, heads)


def loss_of(model, step):
    return model(**{name: value.to(cases.DEVICE) for name, value in batch(model, step).items()}).loss


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranges", [((64, 192),), SCATTERED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_gradients_are_the_whole_ones_cut_sanitizer(dtype, ranges, transposed):
    generator = torch.Generator().manual_seed(0)
    cut, other = (torch.randn(200, n, generator=generator).to(cases.DEVICE, dtype) for n in (384, 96))
    found = head_grad(cut, other, ranges, transposed=transposed)
    truth = oracle.head_grad(cut.double(), other.double(), ranges, transposed=transposed)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2  # TF32 is off, a product may still be split over the tokens
    torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_leaves_have_the_gradients_of_the_plain_model(model_type):
    plain, heads, sliced, bound = there(model_type)
    for model in (plain, sliced):
        loss_of(model, 0).backward()
    expected, found = cut_grads(plain, heads), grads(bound)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2"])
def test_sliced_heads_train_as_unsliced_ones_and_leave_the_rest_alone(model_type, dtype):
    plain, heads, sliced, _ = there(model_type, dtype)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    full = heads.freeze(plain)
    losses = [train(model, alps.HeadAdamW(model.parameters(), lr=1e-3, weight_decay=0.1, heads=heads.bind(model)), 6)
              for model in (plain, sliced)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if dtype == torch.float32 else 3e-2)
    now = sliced.state_dict()
    for part in full.params:
        assert torch.equal(outside(part, now[part.name]), outside(part, before[part.name])), part.name
        assert not torch.equal(now[part.name], before[part.name])
    trained = {part.name for part in full.params}
    assert all(torch.equal(now[name], before[name]) for name in before if name not in trained)


def test_the_weight_that_forward_uses_is_current_after_every_step_sanitizer():
    _, heads, sliced, bound = there("llama", torch.bfloat16)
    optimizer = alps.HeadAdamW(sliced.parameters(), lr=1e-2, heads=bound)
    for step in range(3):
        train(sliced, optimizer, 1, first=step)
        logits = sliced(batch(sliced, 9)["input_ids"].to(cases.DEVICE)).logits
        for _, synced in synced_slices_in(sliced):
            assert torch.equal(synced.cut(synced.weight), synced.leaf)
        again = alps.unslice_heads(copy.deepcopy(sliced))
        assert torch.equal(again(batch(sliced, 9)["input_ids"].to(cases.DEVICE)).logits, logits)


def test_a_step_writes_leaf_and_weight_in_one_launch():
    _, heads, sliced, bound = there("llama", torch.bfloat16)
    optimizer = alps.HeadAdamW(sliced.parameters(), lr=1e-2, heads=bound)
    train(sliced, optimizer, 2)
    loss_of(sliced, 2).backward()
    optimizer.step()
    for part in bound.params:
        if (synced := synced_slice_of(part.param)) is not None:
            assert synced.writable(part.param) and not synced.stale(synced.weight, part.param), part.name
            assert torch.equal(synced.cut(synced.weight), part.param)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_sliced_projections_compile(backend):
    torch._dynamo.reset()
    _, heads, sliced = toy(dtype=torch.float32)
    layout = sliced.layout()
    sliced.to(cases.DEVICE)
    bound = alps.slice_heads(sliced, heads, layout=layout)
    other = copy.deepcopy(sliced)
    sides = ((torch.compile(sliced, backend=backend), sliced, bound), (other, other, heads.bind(other, layout=layout)))
    for forward, model, parts in sides:
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-3, heads=parts)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            forward(torch.randn(4, 10, generator=generator).to(cases.DEVICE)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(sliced.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_autocast_a_scaler_and_checkpointing_train_sliced_heads():
    _, heads, sliced, bound = there("llama")
    sliced.train().gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = alps.HeadAdamW(sliced.parameters(), lr=1e-2, heads=bound)
    scaler = torch.amp.GradScaler(cases.DEVICE, init_scale=1024.0)
    losses = []
    for _ in range(6):
        with torch.autocast(cases.DEVICE, dtype=torch.float16):
            loss = loss_of(sliced, 0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
