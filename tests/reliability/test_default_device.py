"""The public calls under another default device or dtype: the results are those without.

"meta" stands for "cuda", which the machine need not have: a tensor that is made without a device
has no values there, so that whatever reads it fails or differs.
"""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

import alps_kernels as alps
from alps_kernels.demo.chain_sum import collate
from alps_kernels.integrations import finetune
from alps_kernels.ops import METRICS
from alps_kernels.weights import checkpoint

from .models import bytes_of, same, some_heads, tiny

PARTS = ("q", "k", "v", "o")


@contextmanager
def default(kind):
    """What `kind` names is the default."""
    if kind == "meta for good":
        torch.set_default_device("meta")
    elif kind == "bfloat16":
        torch.set_default_dtype(torch.bfloat16)
    try:
        if kind in ("meta", "cpu"):
            with torch.device(kind):
                yield
        else:
            yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def assert_equal(found, expected, where="the result"):
    assert type(found) is type(expected), f"{where} is {type(found)}, expected {type(expected)}"
    if isinstance(found, torch.Tensor):
        assert found.device == expected.device, f"{where} is on {found.device}, expected {expected.device}"
        assert same(found, expected), where
    elif isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            assert_equal(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(found, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert found == expected, where


@pytest.fixture(params=["meta", "meta for good", "cpu", "bfloat16"])
def check(request, tmp_path):
    """Compares what `work(folder, ...)` returns with and without another default; arguments are copied for each."""
    def compare(work, *args):
        (tmp_path / "plain").mkdir()
        (tmp_path / "other").mkdir()
        expected = work(tmp_path / "plain", *copy.deepcopy(args))
        with default(request.param):
            found = work(tmp_path / "other", *copy.deepcopy(args))
        assert_equal(found, expected)

    return compare


def moved(model, scale=1e-3):
    """A copy with noise on every weight."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for param in other.parameters():
            param += scale * torch.randn(param.shape, generator=draw, dtype=torch.float32).to(param.dtype)
    return other


def ids(seed):
    """A batch of token ids."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, 61, (2, 8), generator=draw, device="cpu")


def trained(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        optimizer.zero_grad()
        model(input_ids=ids(i), labels=ids(i)).loss.backward()
        optimizer.step()
    return {**bytes_of(model), "optimizer": optimizer.state_dict()["state"]}


# -- layout, scores, selections ----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_find_heads_and_verify(family, check):
    def work(folder, model):
        layout = alps.find_heads(model)
        layout.verify(model)
        return str(layout), bytes_of(model)

    check(work, tiny(family))


@pytest.mark.parametrize("scale, dtype", [(1e-3, torch.float32), (3.0, torch.float32), (0.0, torch.float32),
                                          (1e-2, torch.bfloat16), (1e-2, torch.float64)], ids=str)
def test_score_heads_of_models(scale, dtype, check):
    def work(folder, base, task):
        return {how: {name: scores.tensor for name, scores in alps.score_heads(
            base, task, metric=METRICS, representation=how).items()} for how in ("projection", "qkv", "o")}

    base = tiny(dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*identical attention weights")
        check(work, base, moved(base, scale))


@pytest.mark.parametrize("stored", ["safetensors", "bin", "converted"])
def test_score_heads_of_checkpoints(stored, check, tmp_path, monkeypatch):
    base, task = tmp_path / "base", tmp_path / "task"
    for model, folder in ((tiny(), base), (moved(tiny()), task)):
        model.save_pretrained(folder)
        if stored == "bin":
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
    if stored == "converted":  # then transformers loads the whole model
        renamed = checkpoint.renamed
        monkeypatch.setattr(checkpoint, "renamed", lambda *args: (
            {name: keys for name, keys in renamed(*args)[0].items() if "q_proj" not in name}, True))

    def work(folder, tuned):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*transformers converts")
            return alps.score_heads(base, task).tensor, alps.score_heads(base, tuned).tensor

    check(work, moved(tiny()))


def test_scores_and_selections(check):
    def work(folder, base, task):
        scores = alps.score_heads(base, task)
        scores.save(folder / "scores.json")
        again = alps.HeadScores.load(folder / "scores.json")
        heads = again.top(0.25)
        heads.save(folder / "heads.json")
        layout = alps.find_heads(base)
        few = [alps.HeadSelection.random(layout, 0.4, seed=3), alps.HeadSelection.layer_consistent(layout, 0.4, seed=3),
               alps.HeadSelection.all(layout), alps.HeadSelection.none(layout)]
        return (str(again), again.ranking(), again.rows(), again.matrix().nan_to_num(-1.0), again.tensor,
                list(alps.HeadSelection.load(folder / "heads.json")), list(map(str, few)), list(map(list, few)))

    check(work, tiny(), moved(tiny()))


@pytest.mark.parametrize("kind", ["heatmap", "histogram", "overlap"])
def test_plots(kind, check):
    pytest.importorskip("matplotlib.pyplot")

    def work(folder, base, task):
        scores = alps.score_heads(base, task)
        other = alps.score_heads(base, task, representation="q") if kind == "overlap" else None
        scores.plot(folder / "plot.png", kind=kind, other=other, ratio=0.25)
        return (folder / "plot.png").stat().st_size > 0

    check(work, tiny(), moved(tiny()))


@pytest.mark.parametrize("rest", ["frozen", "trainable"])
def test_freeze_bind_and_guard(rest, check):
    def work(folder, model):
        heads = some_heads(model)
        bound = heads.freeze(model, rest=rest)
        guard = alps.guard(model)
        with torch.no_grad():
            bound.params[0].blocks(bound.params[0].param)[0].add_(1)
            guard.check()
            model.lm_head.weight[3, 5] += 1
        found = () if rest == "trainable" else guard.changes()
        return ([(part.name, part.ranges, part.cut(part.param)) for part in bound.params], list(map(str, found)),
                [(name, param.requires_grad) for name, param in model.named_parameters()])

    check(work, tiny())


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, options", [
    (torch.float32, {}),
    (torch.float32, {"amsgrad": True, "maximize": True, "fused": True}),
    (torch.float32, {"moment_dtype": torch.bfloat16}),
    (torch.float32, {"moment_dtype": "8bit"}),
    (torch.float32, {"capturable": True, "max_grad_norm": 0.1}),
    (torch.float64, {"max_grad_norm": 0.1}),
    (torch.bfloat16, {"master": "split", "max_grad_norm": 0.1}),
    (torch.bfloat16, {"master": "split", "moment_dtype": "8bit"}),
    (torch.bfloat16, {"master": "kahan"}),
    (torch.bfloat16, {"master": "stochastic", "moment_dtype": torch.bfloat16}),
    (torch.float16, {"master": "split"}),
], ids=str)
@pytest.mark.parametrize("check", ["meta", "meta for good", "bfloat16"], indirect=True)
def test_head_adamw(dtype, options, check):
    """Steps, another selection, GradScaler's attributes, state dicts; loading them and going on."""
    grads = {name: 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
             for name, p in tiny(dtype=dtype).named_parameters()}

    def optimizer_of(model, seed):
        heads = some_heads(model, seed).bind(model)
        return alps.HeadAdamW(model.parameters(), lr=1e-2, weight_decay=0.1, heads=heads, **options)

    def step(model, optimizer, n):
        for _ in range(n):
            for name, param in model.named_parameters():
                param.grad = grads[name].clone()
            optimizer.step()

    def work(folder, model):
        optimizer = optimizer_of(model, 1)
        step(model, optimizer, 2)
        optimizer.set_heads(some_heads(model, 2).bind(model))
        step(model, optimizer, 1)
        optimizer.grad_scale = torch.tensor(4.0, device="cpu", dtype=torch.float32)
        for found_inf in (0.0, 1.0):
            optimizer.found_inf = torch.tensor(found_inf, device="cpu", dtype=torch.float32)
            step(model, optimizer, 1)
        del optimizer.grad_scale, optimizer.found_inf
        saved, dense = copy.deepcopy(optimizer.state_dict()), optimizer.dense_state_dict()
        torch.save(saved, folder / "state.pt")
        other = copy.deepcopy(model)
        resumed = optimizer_of(other, 2)
        resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=False))
        cut = optimizer_of(copy.deepcopy(model), 2)
        cut.load_state_dict(dense)
        step(other, resumed, 1)
        return (bytes_of(model), bytes_of(other), saved["state"], dense["state"], cut.state_dict()["state"],
                resumed.state_dict()["state"], optimizer.grad_norm)

    check(work, tiny(dtype=dtype))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_slices(family, check):
    """slice_heads, steps, unslice_heads."""
    def work(folder, model):
        bound = alps.slice_heads(model, some_heads(model))
        optimizer = alps.HeadAdamW(model.parameters(), lr=1e-2, heads=bound)
        found = trained(model, optimizer, 3)
        alps.unslice_heads(model)
        return found, bytes_of(model)

    check(work, tiny(family))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patches(family, check, tmp_path):
    """Save, apply, revert; apply to a checkpoint; exports."""
    base = tiny(family)
    base.save_pretrained(tmp_path / "base")

    def work(folder, model):
        tuned = copy.deepcopy(model)
        bound = some_heads(tuned).freeze(tuned)
        with torch.no_grad():
            for part in bound.params:
                for block in part.blocks(part.param):
                    block += 0.5
        alps.save_patch(tuned, folder / "p.safetensors", base=model)
        alps.apply_patch(model, folder / "p.safetensors")
        applied = bytes_of(model)
        alps.revert_patch(model)
        alps.export_merged(folder / "p.safetensors", tmp_path / "base", folder / "merged")
        alps.export_lora(folder / "p.safetensors", tmp_path / "base", folder / "lora")
        alps.export_lora(folder / "p.safetensors", tmp_path / "base", folder / "lora1", rank=1)
        alps.export_sparse(folder / "p.safetensors", tmp_path / "base", folder / "sparse")
        return applied, bytes_of(model), {
            str(file.relative_to(folder)): load_file(file) for file in sorted(folder.rglob("*.safetensors"))}

    check(work, base)


# -- what other libraries feed -----------------------------------------------------------------


def test_collate_and_the_share_of_a_dataset(check):
    """What a DataLoader gets, and which examples a run draws."""
    class Tokenizer:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text, **_):
            return {"input_ids": list(map(ord, text))}

    class Item:
        def __init__(self, prompt, answer):
            self.prompt, self.answer = prompt, answer

    check(lambda folder: (collate(Tokenizer(), [Item("1+1=", "2"), Item("", "abc")]),
                          finetune._share(list(range(20)), 0.3, 1).indices))
