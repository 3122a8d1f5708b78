"""`HeadPatch`: the tuned slices of some heads in memory, and reading and writing their file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from ..selection import HeadSelection
from ..tensors import check_type
from ..weights import TensorInfo
from .slices_file import TensorSlice, read_digest, read_info, read_slices_file, write_slices_file

FORMAT = "alps_kernels.patch"


@dataclass(frozen=True)
class Outside:
    """One parameter of the base: what it is, and the SHA-256 of what the patch leaves of it."""

    info: TensorInfo
    digest: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> str:
        return self.info.dtype


@dataclass(frozen=True, eq=False)
class HeadPatch:
    """The slices of some heads, tuned, and which base they belong to.

    The bytes outside the selected slices are the same in the base and in the tuned model, so
    their digests tell the base from either of them. Where the base was at hand, the digests of its
    whole parameters are there too, and a patch is checked completely before it is applied.

    Attributes:
        name: what to call it.
        selection: the heads.
        cuts: for every parameter of which it holds something, what.
        values: the tuned slices, of shape `cut.stored`.
        outside: every parameter of the base.
        base: for every parameter in `cuts` the digest of all of it in the base; None where the
            patch was made without the base.
        model_type, architecture: of the model it was made from.
        provenance: anything JSON about where it is from.
    """

    name: str
    selection: HeadSelection
    cuts: dict[str, TensorSlice]
    values: dict[str, Tensor] = field(repr=False)
    outside: dict[str, Outside] = field(repr=False)
    base: dict[str, str] | None = field(repr=False)
    model_type: str = ""
    architecture: str = ""
    provenance: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """One digest of everything outside the slices; the base and the tuned model share it."""
        return _combined(self.outside, {})

    @property
    def base_fingerprint(self) -> str | None:
        """One digest of the whole base, the same for all patches of it; None where the base was not at hand."""
        return None if self.base is None else _combined(self.outside, self.base)

    @property
    def numel(self) -> int:
        return sum(values.numel() for values in self.values.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the slices, without the header."""
        return sum(values.nbytes for values in self.values.values())

    @property
    def dtypes(self) -> list[str]:
        return sorted({cut.dtype for cut in self.cuts.values()})

    def to(self, device: torch.device | str) -> HeadPatch:
        """The same patch with its values on `device`: ready for swapping without a transfer."""
        return replace(self, values={name: v.to(device) for name, v in self.values.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Write the patch atomically.

        Raises:
            OSError: the file cannot be written; what was there is untouched.
            TypeError, ValueError: the provenance is not JSON.
        """
        write_slices_file(path, FORMAT, {
            "model_type": self.model_type, "architecture": self.architecture,
            "fingerprint": self.fingerprint, "base_fingerprint": self.base_fingerprint,
            "selection": self.selection.to_json(), "provenance": self.provenance,
            "outside": {name: [*known.info, known.digest] for name, known in self.outside.items()},
        }, self.cuts, self.values, base=self.base or {})

    @classmethod
    def load(cls, path: str | os.PathLike, *, name: str | None = None) -> HeadPatch:
        """Read what `save` wrote; every value is checked against its digest.

        Args:
            name: what to call it; default: the file's name without its suffix.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, foreign or contradicts itself; the message names the file.
        """
        with read_slices_file(path, FORMAT) as (document, cuts, values):
            for key in ("model_type", "architecture"):
                if not isinstance(document.get(key), str):
                    raise ValueError(f"its {key} is {document.get(key)!r}")
            provenance = document.get("provenance")
            if provenance is not None and not isinstance(provenance, dict):
                raise ValueError("its provenance is not an object")
            outside = _read_outside(document.get("outside"))
            for key, cut in cuts.items():
                known = outside[key].info if key in outside else None
                if known != cut.info:
                    raise ValueError(f"{key} is {cut.info} where it is cut, "
                                     + (f"{known} in" if known else "not in") + " the base")
            base = {key: read_digest(entry["base"]) for key, entry in document["tensors"].items() if "base" in entry}
            if base and set(base) != set(cuts):
                raise ValueError(f"it has digests of the base for {len(base)} of {len(cuts)} tensors")
            known_base = bool(base) or (not cuts and document.get("base_fingerprint") is not None)
            patch = cls(Path(path).stem if name is None else name, HeadSelection.from_json(document.get("selection")),
                        cuts, values, outside, base if known_base else None, document["model_type"],
                        document["architecture"], provenance)
            for key in ("fingerprint", "base_fingerprint"):
                if document.get(key) != getattr(patch, key):
                    raise ValueError(f"its {key} is not that of the parameters it lists")
            return patch

    def __str__(self) -> str:
        heads, total = len(self.selection), sum(self.selection.heads_per_layer)
        return (f"{self.name}: {heads} of {total} heads of a {self.architecture}, {self.numel:,} "
                f"{'/'.join(self.dtypes)} values in {len(self.cuts)} tensors, {self.nbytes:,} bytes")


def _read_outside(entries: Any) -> dict[str, Outside]:
    if not isinstance(entries, dict):
        raise ValueError("its header does not describe the base")
    found = {}
    for name, entry in entries.items():
        if not isinstance(entry, list) or len(entry) != 3:
            raise ValueError(f"what it says of {name!r} of the base is not shape, dtype and digest")
        try:
            found[name] = Outside(read_info(*entry[:2]), read_digest(entry[2]))
        except ValueError as error:
            raise ValueError(f"{name!r} of the base: {error}") from error
    return found


def _combined(outside: Mapping[str, Outside], whole: Mapping[str, str]) -> str:
    rows = [[name, *known.info, whole.get(name, known.digest)] for name, known in sorted(outside.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


PatchLike = Union[str, os.PathLike, HeadPatch]


def loaded(patch: PatchLike) -> HeadPatch:
    """The patch itself, or the one in a file."""
    return patch if isinstance(patch, HeadPatch) else HeadPatch.load(patch)


def several(patches: PatchLike | Sequence[PatchLike]) -> list[PatchLike]:
    """One patch or several, as a list; whatever else is given is a TypeError."""
    found = list(patches) if isinstance(patches, (list, tuple)) else [patches]
    for patch in found:
        check_type("a patch", patch, (str, os.PathLike, HeadPatch), "a file or a HeadPatch")
    return found
