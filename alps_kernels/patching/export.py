"""A head patch in forms that others take: a LoRA adapter, a whole checkpoint, a sparse weight update."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tensors import new_folder, save_tensors, write_json
from ..weights import Weights, canonical
from .checkpoint import apply_to_checkpoint, sparse_updates
from .fit import check_fits, whole_weights
from .patch import HeadPatch, PatchLike, loaded
from .slices_file import TensorSlice


@dataclass(frozen=True)
class LoraModule:
    """What the adapter of one projection holds.

    Attributes:
        rank: of B A.
        exact: B A is the difference itself, element by element as float32 holds it.
        error: the Frobenius norm of what B A leaves out, over that of the difference.
    """

    rank: int
    exact: bool
    error: float


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote: the modules by name, and the bytes of the adapter's tensors."""

    modules: dict[str, LoraModule]
    nbytes: int

    @property
    def error(self) -> float:
        """The largest relative error of a module."""
        return max((module.error for module in self.modules.values()), default=0.0)

    def __str__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        exact = sum(module.exact for module in self.modules.values())
        return (f"LoRA of {len(self.modules)} modules, rank {' '.join(map(str, ranks)) or '-'}, "
                f"{self.nbytes:,} bytes; {exact} exact, largest relative error {self.error:.3g}")


def export_lora(patch: PatchLike, base: nn.Module | str | os.PathLike, folder: str | os.PathLike, *,
                rank: int | None = None, config: Any = None) -> LoraExport:
    """Write the patch as a PEFT LoRA adapter of `base`.

    Where all differing rows of a projection are kept, B is one-hot and A holds the differences
    (for columns, of `o`, the reverse); B A is then exact. Rows of other heads get exactly zero.
    Factors are float32: the difference of two bfloat16 or float16 weights that are of like size is
    exact in it, that of two float32 weights is rounded once (2^-24 relative). base + B A is therefore
    the tuned weight up to one rounding, not byte for byte; merging into 16-bit weights rounds B A to
    them first. Differences of biases become the bias of `lora_B` (`lora_bias`).

    Args:
        base: the patch's base: a model in memory, or a checkpoint folder.
        folder: new; adapter_config.json and adapter_model.safetensors, whose header states ranks and errors.
        rank: the largest rank; a projection whose differences need more gets the best
            approximation of that rank (SVD), whose error is stated. None: as much as is exact.
        config: used instead of a folder's config.json.

    Raises:
        ValueError: the patch does not fit, or a slice is of something PEFT's LoRA has no form for.
        FileExistsError: the folder is there already.
    """
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; expected a whole number from 1")
    patch, weights = loaded(patch), whole_weights(base, config)
    check_fits(patch, weights)
    matrices, biases = _by_module(patch, weights)
    tensors, modules = {}, {}
    for name, key in matrices.items():
        b, a, modules[name] = _factors(patch, weights, key, rank)
        if _is_conv1d(_module(weights, name)):
            b, a = a.t(), b.t()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        if biases:
            bias = b.new_zeros(b.shape[0])
            if name in biases:
                patch.cuts[biases[name]].put(_delta(patch, weights, biases[name]), bias)
            tensors[f"base_model.model.{name}.lora_B.bias"] = bias
    described = _adapter_config(weights, modules, bool(biases))
    said = json.dumps({"patch": patch.name, "fingerprint": patch.fingerprint,
                       "modules": {name: vars(made) for name, made in modules.items()}})
    with new_folder(folder) as temporary:
        save_tensors(temporary / "adapter_model.safetensors", tensors, {"format": "pt", "alps_kernels.lora": said})
        write_json(temporary / "adapter_config.json", described)
    return LoraExport(modules, sum(tensor.nbytes for tensor in tensors.values()))


def export_merged(patches: PatchLike | Sequence[PatchLike], base: str | os.PathLike, folder: str | os.PathLike, *,
                  keep_originals: bool = False, config: Any = None) -> None:
    """Write the base's checkpoint folder with the patches in it: exact, every other byte copied.

    Raises: as `apply_to_checkpoint`.
    """
    patches = [patches] if isinstance(patches, (str, os.PathLike, HeadPatch)) else patches
    apply_to_checkpoint(base, list(map(loaded, patches)), folder, keep_originals=keep_originals, config=config)


def export_sparse(patch: PatchLike, base: str | os.PathLike, folder: str | os.PathLike, *,
                  config: Any = None) -> dict[str, Any]:
    """Write the patch as an update of the base's checkpoint, by the names of its tensors.

    The new folder holds sparse_update.safetensors (under each tensor's stored name its new rows or
    columns, one behind the other) and sparse_update.index.json (of each shape, dtype, axis,
    half-open ranges, and digests of the new values and of those they replace).

    Returns:
        the index.

    Raises:
        ValueError: the patch does not fit, or transformers converts a tensor while loading.
        FileExistsError: the folder is there already.
    """
    patch, weights = loaded(patch), whole_weights(base, config)
    check_fits(patch, weights)
    update, _ = sparse_updates(weights, [patch])
    with new_folder(folder) as temporary:
        index = update.save(temporary / "sparse_update.safetensors")
        write_json(temporary / "sparse_update.index.json", index)
    return index


def _module(weights: Weights, name: str) -> nn.Module:
    return next(module for key, module in weights.model.named_modules() if canonical(key) == name)


def _is_conv1d(module: nn.Module) -> bool:
    """The projection is transformers' Conv1D, which stores its weight [in, out]."""
    return any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def _by_module(patch: HeadPatch, weights: Weights) -> tuple[dict[str, str], dict[str, str]]:
    """The patch's weights and biases by module.

    Raises:
        ValueError: one is neither of a Linear nor of a Conv1D.
    """
    matrices, biases = {}, {}
    for key in patch.cuts:
        name, _, kind = key.rpartition(".")
        module = _module(weights, name)
        if kind not in ("weight", "bias") or not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            raise ValueError(f"{key} of patch {patch.name!r} is held by a {type(module).__name__}, for which PEFT's "
                             "LoRA has no form; export it merged instead")
        (matrices if kind == "weight" else biases)[name] = key
    if not matrices:
        raise ValueError(f"patch {patch.name!r} holds no weights, so there is no LoRA of it")
    if lone := sorted(set(biases) - set(matrices)):
        raise ValueError(f"patch {patch.name!r} changes the bias of {lone[0]} and not its weight, "
                         "for which LoRA has no form")
    return matrices, biases


def _delta(patch: HeadPatch, weights: Weights, key: str) -> Tensor:
    """Tuned minus base, float32."""
    base = patch.cuts[key].take(weights.read([key])[key]).cpu().double()
    return patch.values[key].cpu().double().sub_(base).float()


def _factors(patch: HeadPatch, weights: Weights, key: str, rank: int | None) -> tuple[Tensor, Tensor, LoraModule]:
    """Left and right factors of one weight's difference, in the orientation in which it is stored."""
    cut: TensorSlice = patch.cuts[key]
    delta = _delta(patch, weights, key)
    if not bool(delta.isfinite().all()):
        raise ValueError(f"{key}: the patch or its base holds values that are not finite")
    places = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in cut.ranges])
    length = cut.matrix[cut.dim]
    rows = delta if cut.dim == 0 else delta.t()  # [selected, other axis]
    exact = min(rows.shape)
    if rank is None or rank >= exact:
        one = torch.eye(exact, dtype=torch.float32, device="cpu")
        near, far = (one, rows) if len(rows) == exact else (rows, one)
        made = LoraModule(exact, True, 0.0)
    else:
        u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
        root = s[:rank].sqrt()
        near, far = (u[:, :rank] * root).float(), (v[:rank] * root[:, None]).float()
        norm = s.norm().item()
        left = (rows.double() - near.double() @ far.double()).norm().item()
        made = LoraModule(rank, False, left / norm if norm else 0.0)
    spread = near.new_zeros(length, near.shape[1]).index_copy_(0, places, near.contiguous())
    return (spread, far, made) if cut.dim == 0 else (far.t(), spread.t(), made)


def _adapter_config(weights: Weights, modules: dict[str, LoraModule], biased: bool) -> dict[str, Any]:
    ranks = {re.escape(name): module.rank for name, module in modules.items()}
    largest = max(ranks.values())
    kind, config = type(weights.model).__name__, getattr(weights.model, "config", None)
    task = ("SEQ_2_SEQ_LM" if "ConditionalGeneration" in kind or "Seq2Seq" in kind else
            "CAUSAL_LM" if kind.endswith(("ForCausalLM", "LMHeadModel")) else None)
    return {
        "peft_type": "LORA", "task_type": task, "inference_mode": True,
        "base_model_name_or_path": getattr(config, "name_or_path", "") or str(getattr(weights, "path", "")) or None,
        "r": largest, "lora_alpha": largest, "rank_pattern": ranks, "alpha_pattern": ranks,
        "target_modules": sorted(modules),
        "fan_in_fan_out": any(_is_conv1d(_module(weights, name)) for name in modules),
        "bias": "none", "lora_bias": biased, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
        "init_lora_weights": True, "modules_to_save": None,
    }
