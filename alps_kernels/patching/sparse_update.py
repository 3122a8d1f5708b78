"""A sparse weight update: new values for some rows or columns of a checkpoint's tensors, by their stored names.

For servers that change weights in place, and for putting back what a patch replaced.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .slices_file import TensorSlice, digest, read_digest, read_slices, write_slices

FORMAT = "alps_kernels.sparse"


class SparseUpdate:
    """New values for slices of a checkpoint's tensors.

    Args:
        cuts: by the tensor's name in the checkpoint, which part.
        values: the new values, of shape `cut.stored`.
        replaces: digests of the values that they replace.
        about: anything JSON about where they are from.
    """

    def __init__(self, cuts: Mapping[str, TensorSlice], values: Mapping[str, Tensor], replaces: Mapping[str, str],
                 about: Mapping[str, Any] | None = None) -> None:
        self.cuts, self.values, self.replaces, self.about = dict(cuts), dict(values), dict(replaces), dict(about or {})

    def check_replaces(self, key: str, found: Tensor, where: str) -> None:
        """Raises ValueError where `found`, the slices of a tensor now, are not what this update replaces."""
        if digest(found) != self.replaces[key]:
            raise ValueError(f"the slices of {key} in {where} are not those that this update replaces")

    def index(self) -> dict[str, Any]:
        """What the file's header says, for those who would rather read JSON."""
        return {"format": FORMAT, "version": 1, "about": self.about,
                "tensors": {key: {**cut.to_json(), "values": digest(self.values[key]), "replaces": self.replaces[key]}
                            for key, cut in self.cuts.items()}}

    def save(self, path: str | os.PathLike) -> None:
        """Write the update atomically; the values lie under the tensors' own names."""
        write_slices(path, FORMAT, {"about": self.about}, self.cuts, self.values,
                     {key: {"replaces": known} for key, known in self.replaces.items()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> SparseUpdate:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is torn, foreign or contradicts itself; the message names the file.
        """
        document, cuts, values = read_slices(path, FORMAT)
        try:
            replaces = {key: read_digest(document["tensors"][key].get("replaces")) for key in cuts}
            if not isinstance(document.get("about"), dict):
                raise ValueError("it does not say where it is from")
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is not a valid {FORMAT} file: {error}") from error
        return cls(cuts, values, replaces, document["about"])
