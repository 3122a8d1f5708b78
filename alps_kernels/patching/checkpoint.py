"""Head patches on checkpoint folders: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..selection import HeadSelection
from ..tensors import first_of, merge, new_folder
from ..weights import PICKLE_SUFFIXES, Checkpoint, TensorFiles, TensorInfo
from .fit import check_apart, check_fits, whole_weights
from .make import make_patch
from .patch import HeadPatch
from .slices_file import TensorSlice, digest, raw, read_digest, read_slices_file, write_slices_file

SPARSE_FORMAT = "alps_kernels.sparse"
KEPT = "alps_patch"  # the folder in a patched checkpoint that holds what revert puts back
# Files of tensors in a checkpoint folder that hold no weights: what Trainer saves beside them.
STATE = ("optimizer", "scheduler", "rng_state", "training_args", "scaler")


@dataclass(frozen=True, eq=False)
class SparseUpdate:
    """New values for some rows or columns of a checkpoint's tensors, by their stored names.

    For servers that change weights in place, and for putting back what a patch replaced.

    Attributes:
        cuts: by the tensor's name in the checkpoint, which part.
        values: the new values, of shape `cut.stored`.
        replaces: digests of the values that they replace.
        about: anything JSON about where they are from.
    """

    cuts: dict[str, TensorSlice]
    values: dict[str, Tensor]
    replaces: dict[str, str]
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> dict[str, Any]:
        """Write the update atomically, the values under the tensors' own names; returns what its header says."""
        about = {"about": self.about}
        header = write_slices_file(path, SPARSE_FORMAT, about, self.cuts, self.values, replaces=self.replaces)
        return {key: header[key] for key in ("format", "version", "about", "tensors")}

    @classmethod
    def load(cls, path: str | os.PathLike) -> SparseUpdate:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, foreign or contradicts itself; the message names the file.
        """
        with read_slices_file(path, SPARSE_FORMAT) as (document, cuts, values):
            replaces = {key: read_digest(document["tensors"][key].get("replaces")) for key in cuts}
            if not isinstance(document.get("about"), dict):
                raise ValueError("it does not say where it is from")
            return cls(cuts, values, replaces, document["about"])


def patch_from_checkpoints(base: str | os.PathLike, tuned: str | os.PathLike, heads: HeadSelection, *,
                           name: str = "patch", provenance: dict | None = None, allow_outside_changes: bool = False,
                           config: Any = None) -> HeadPatch:
    """The patch that turns one checkpoint into the other, a few tensors of each in memory; see `make_patch`.

    Args:
        config: of both, where their folders have none.
    """
    return make_patch(whole_weights(tuned, config), heads, base=whole_weights(base, config), name=name,
                      provenance=provenance, allow_outside_changes=allow_outside_changes)


def apply_to_checkpoint(checkpoint: str | os.PathLike, patches: Sequence[HeadPatch], out: str | os.PathLike, *,
                        keep_originals: bool = True, verify: bool = True, config: Any = None) -> None:
    """Write the checkpoint with the patches in it to a new folder, everything else copied.

    Of safetensors files every other byte is the same; files of pickled tensors that hold patched
    ones are written anew, with every other tensor the same.

    Args:
        patches: of this very checkpoint, on separate heads.
        out: the new folder; it appears whole or not at all.
        keep_originals: put the replaced slices in it too, for `revert_checkpoint`.
        config: used instead of the folder's config.json.

    Raises:
        ValueError: a patch does not fit, or two change the same slices; nothing is written.
        FileExistsError: `out` is there already.
    """
    weights = whole_weights(checkpoint, config)
    for at, patch in enumerate(patches):
        for other in patches[:at]:
            check_apart(weights, other, patch)
        check_fits(patch, weights, verify=verify)
    new, old = sparse_updates(weights, patches)
    _write_folder(weights.path, new, out, old if keep_originals else None)


def sparse_updates(weights: Checkpoint, patches: Sequence[HeadPatch]) -> tuple[SparseUpdate, SparseUpdate]:
    """Patches as one update under the names of a checkpoint, and the update that undoes it.

    Raises:
        ValueError: a parameter is converted while loading, so that no one tensor of the checkpoint is it.
    """
    about = {"patches": [{"name": patch.name, "fingerprint": patch.fingerprint,
                          "heads": list(map(list, patch.selection))} for patch in patches]}
    cuts, new, old = {}, {}, {}
    for name in dict.fromkeys(name for patch in patches for name in patch.cuts):
        key, file = weights.stored(name)
        if key in cuts:
            raise ValueError(f"{key} in {file} is {name} and another parameter that the patch changes")
        held = [patch for patch in patches if name in patch.cuts]
        ranges = merge(span for patch in held for span in patch.cuts[name].ranges)
        cuts[key] = replace(held[0].cuts[name], ranges=ranges)
        tensor = weights.read([name])[name].clone()
        old[key] = cuts[key].take(tensor)
        for patch in held:
            patch.cuts[name].put(patch.values[name].cpu(), tensor)
        new[key] = cuts[key].take(tensor)
    return (SparseUpdate(cuts, new, {key: digest(values) for key, values in old.items()}, about),
            SparseUpdate(cuts, old, {key: digest(values) for key, values in new.items()}, about))


def revert_checkpoint(checkpoint: str | os.PathLike, out: str | os.PathLike,
                      originals: str | os.PathLike | None = None) -> None:
    """Write a patched checkpoint with its originals put back to a new folder.

    Args:
        originals: the file of replaced slices; default: the one `apply_to_checkpoint` put into the folder.

    Raises:
        FileNotFoundError: the folder holds no originals.
        ValueError: the checkpoint's slices are not those of the patch any more.
    """
    checkpoint = Path(checkpoint)
    kept = kept_files(checkpoint)
    if originals is None and not kept:
        raise FileNotFoundError(f"{checkpoint / KEPT} holds no originals.*.safetensors: without what a patch "
                                "replaced the checkpoint cannot be reverted (give the file, or take the base)")
    file = kept[-1] if originals is None else Path(originals)
    update = SparseUpdate.load(file)
    files = TensorFiles(checkpoint)
    if unknown := sorted(set(update.cuts) - set(files.files)):
        raise ValueError(f"{checkpoint} does not hold {first_of(unknown)}, which {file} has slices of")
    for key, cut in update.cuts.items():
        tensor = files.read([key])[key]
        if TensorInfo.of(tensor) != cut.info:
            raise ValueError(f"{key} of {checkpoint} is {TensorInfo.of(tensor)}; {file} has slices of {cut.info}")
        if digest(cut.take(tensor)) != update.replaces[key]:
            raise ValueError(f"the slices of {key} in {checkpoint} are not those that this update replaces")
    _write_folder(checkpoint, update, out, None, spent=file if originals is None else None)


def kept_files(checkpoint: Path) -> list[Path]:
    """What patches replaced in this checkpoint, the latest last."""
    return sorted((checkpoint / KEPT).glob("originals.*.safetensors"))


def _write_folder(checkpoint: Path, update: SparseUpdate, out: str | os.PathLike, kept: SparseUpdate | None,
                  spent: Path | None = None) -> None:
    """Copy a checkpoint folder but for the file `spent`, put `update` into the copy, and let it appear as `out`."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is a file; expected a checkpoint folder, all of which is copied")
    if checkpoint.resolve() in Path(out).resolve().parents:
        raise ValueError(f"{out} lies inside {checkpoint}; give a folder beside it")
    files, by_file = TensorFiles(checkpoint).files, defaultdict(list)
    for key in update.cuts:
        by_file[files[key].name].append(key)
    used = {file.name for file in files.values()}
    if others := sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*")
                        if file.suffix in (".safetensors", ".gguf", *PICKLE_SUFFIXES) and file.name not in used
                        and KEPT not in file.parts and not file.name.startswith(STATE)):
        warnings.warn(f"{checkpoint} also holds {first_of(others)}, copied as it is: if those are weights of the "
                      "model, they are without the patch", stacklevel=3)
    with new_folder(out) as folder:
        try:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        except shutil.Error as error:  # a list of every file that could not be copied
            raise OSError(f"{checkpoint} cannot be copied to {out}: {error.args[0][0][-1]}") from error
        for name, keys in by_file.items():
            _patch_file(folder / name, {key: (update.cuts[key], update.values[key]) for key in keys})
        if spent is not None:
            (folder / spent.relative_to(checkpoint)).unlink()
            if not any((folder / KEPT).iterdir()):
                (folder / KEPT).rmdir()
        if kept is not None:
            (folder / KEPT).mkdir(exist_ok=True)
            kept.save(folder / KEPT / f"originals.{len(kept_files(checkpoint)) + 1:03d}.safetensors")


def _patch_file(file: Path, slices: Mapping[str, tuple[TensorSlice, Tensor]]) -> None:
    """Put slices into tensors of one file of a checkpoint, in place; the rest of it is not touched."""
    file.chmod(file.stat().st_mode | 0o200)
    if file.suffix in PICKLE_SUFFIXES:
        held = torch.load(file, map_location="cpu", weights_only=True)
        for key, (cut, values) in slices.items():
            cut.put(values, held[key])
        try:
            torch.save(held, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{file} cannot be written: {error}") from error
        return
    with open(file, "r+b") as raw_file:
        size = int.from_bytes(raw_file.read(8), "little")
        header = json.loads(raw_file.read(size))
        for key, (cut, values) in slices.items():
            start, stop = header[key]["data_offsets"]
            raw_file.seek(8 + size + start)
            data = bytearray(raw_file.read(stop - start))
            tensor = torch.frombuffer(data, dtype=getattr(torch, cut.dtype)).view(cut.shape)
            cut.put(values, tensor)
            raw_file.seek(8 + size + start)
            raw_file.write(raw(tensor))
