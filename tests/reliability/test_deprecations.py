"""What this package calls of torch and transformers is not about to go: deprecation warnings are errors."""

import warnings

import pytest
import torch

import alps_kernels as alps

from .models import FAMILIES, optimizer_of, some_heads, tiny, train

pytestmark = pytest.mark.fault("Compatibility")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_whole_run(family, tmp_path):
    """locating, scoring, freezing, training, saving, slicing and patching with every deprecation warning an error"""
    base, tuned = tiny(family), tiny(family)
    tuned.save_pretrained(tmp_path / "tuned")
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("error", kind)
        heads = some_heads(tuned)
        optimizer = optimizer_of(tuned, heads, max_grad_norm=1.0)
        train(tuned, optimizer, 4)
        optimizer.load_state_dict(optimizer.state_dict())
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)
        alps.save_patch(tuned, tmp_path / "p.safetensors")
        alps.apply_patch(base, tmp_path / "p.safetensors")
        alps.revert_patch(base)
        tuned.save_pretrained(tmp_path / "after")
        scores = alps.score_heads(tmp_path / "tuned", tmp_path / "after", metric="pad", representation="qkv")
        scores.save(tmp_path / "s.safetensors")
        scores.top(0.5).save(tmp_path / "h.json")
        bound = alps.slice_heads(base, alps.HeadSelection.load(tmp_path / "h.json"))
        train(base, alps.HeadAdamW(base.parameters(), heads=bound), 4)
        alps.unslice_heads(base)
        alps.guard(base, heads).check()
