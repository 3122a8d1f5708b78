"""Guard of what must not move: digests of every byte outside a selection.

The file is not called guard.py: importing it would hide the function of that name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layout import HeadLayout
from ..tensors import Ranges, check_type, complement, local_part, matrix_shape, merge, synced_slices_in
from .binding import BoundParam, BoundSelection
from .selection import HeadSelection, selection_of
from .shards import part_here

SLAB = {"cpu": 2**18, "cuda": 2**24}  # words digested at once: near the cache, or enough to fill the device
FOLD = 64  # elements of a long vector that share a digest
SHOWN = 4  # places that an error names


class GuardError(RuntimeError):
    """Something outside the selection moved.

    Attributes:
        changes: every tensor that did, and where.
    """

    def __init__(self, changes: tuple[Change, ...]) -> None:
        self.changes = changes
        more = f" (and {len(changes) - SHOWN} more tensors)" if len(changes) > SHOWN else ""
        super().__init__("outside the selection moved " + "; ".join(map(str, changes[:SHOWN])) + more)


@dataclass(frozen=True)
class Change:
    """One tensor that moved outside the selection.

    Attributes:
        name: of the parameter or buffer.
        rows, columns: half-open ranges of the tensor seen as [shape[0], -1] (of a sharded one: of
            what this rank holds); the columns are empty where they could not be told (or where it is a vector).
        what: said instead of places, where the tensor is gone or of another dtype or shape.
    """

    name: str
    rows: Ranges = ()
    columns: Ranges = ()
    what: str = ""

    def __str__(self) -> str:
        if self.what:
            return f"{self.name} ({self.what})"
        return f"{self.name} " + " of ".join(f"{kind} {_said(spans)}" for kind, spans in
                                             (("columns", self.columns), ("rows", self.rows)) if spans)


def guard(model: nn.Module, heads: HeadSelection | BoundSelection | None = None, *, rest: str | None = None,
          buffers: bool = True, layout: HeadLayout | None = None) -> Guard:
    """Remember every byte of `model` that `heads` does not train, as digests.

        with alps.guard(model, heads):        # raises GuardError on the way out
            train()

        alps.guard(model, heads).watch(optimizer, every=500)

    A digest is sum(k_i w_i) mod 2^64 over the 32-bit words of a row, k_i random and odd: one
    changed word always shows, any other change but for odds of 2^-32 a row (multilinear
    hashing). It takes one read of the weights on the device they are on, 8 bytes of memory for
    each row and column, and one synchronisation for each check.

    Args:
        heads: what trains; default: what was last frozen, sliced or patched on this model.
        rest: as in `HeadSelection.bind`.
        buffers: watch buffers too. False where they move by design (running statistics).
        layout: the model's, where it is already known.

    Raises:
        ValueError: it is not known what trains, the selection is of another model, or a tensor
            has no bytes to read (meta device, sparse); it is named.
    """
    heads = selection_of(model) if heads is None else heads
    if heads is None:
        raise ValueError("nothing says what trains of this model: give heads=")
    if isinstance(heads, HeadSelection):
        heads = heads.bind(model, rest=rest, layout=layout)
    check_type("heads", heads, BoundSelection, "a HeadSelection, or what its bind(model) returns")
    return Guard(model, heads, buffers)


class Guard:
    """See `guard`. What it compares with is the model at the time it was made.

    Attributes:
        numel: elements that are watched.
    """

    def __init__(self, model: nn.Module, heads: BoundSelection, buffers: bool) -> None:
        named = dict(model.named_parameters())
        if lost := [part.name for part in heads.params if named.get(part.name) is not part.param]:
            raise ValueError(f"{lost[0]} of the selection is not a parameter of this model: bind the selection to it")
        self._model, self._buffers = model, buffers
        self._parts = {part.name: part for part in heads.params}
        # The synced slices of a full weight follow its leaf, which is watched itself.
        self._parts |= {name: BoundParam(name, synced.weight, synced.dim, synced.ranges)
                        for name, synced in synced_slices_in(model)}
        self._keys: Tensor | None = None
        numel = {name: sum(block.numel() for _, block in self._frozen(name, tensor))
                 for name, tensor in self._tensors()}
        watched = [(name, tensor) for name, tensor in self._tensors() if numel[name]]
        self._facts = {name: _facts(tensor) for name, tensor in watched}
        self._digests = {name: self._digest(name, tensor) for name, tensor in watched}
        self.numel = sum(numel.values())

    def check(self) -> None:
        """Raises GuardError where a byte outside the selection is not what it was."""
        if changes := self.changes():
            raise GuardError(changes)

    @torch.no_grad()
    def changes(self) -> tuple[Change, ...]:
        """Every tensor that moved outside the selection."""
        now, found, doubted = dict(self._tensors()), {}, {}
        for name, facts in self._facts.items():
            if name not in now:
                found[name] = Change(name, what="it is gone")
            elif _facts(now[name]) != facts:
                found[name] = Change(name, what=f"it was {facts} and is {_facts(now[name])}")
            else:
                digest = self._digest(name, now[name])
                old = [part.to(digest[0].device) for part in self._digests[name]]
                doubted[name] = [new != then for new, then in zip(digest, old, strict=True)]
        flags = [differ[0].any() for differ in doubted.values()]
        flags = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
        for name, moved in zip(doubted, flags, strict=True):
            if moved:
                found[name] = self._locate(name, now[name], *doubted[name])
        return tuple(found[name] for name in self._facts if name in found)

    def watch(self, optimizer: torch.optim.Optimizer, every: int = 1) -> RemovableHandle:
        """Check after every `every`-th step of `optimizer`; the handle's `remove()` ends it."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; expected a whole number of steps, 1 or more")
        steps = 0

        def after_step(*_) -> None:
            nonlocal steps
            steps += 1
            if steps % every == 0:
                self.check()

        return optimizer.register_step_post_hook(after_step)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.check()

    # -- what is watched ---------------------------------------------------------------------

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._model.named_parameters():
            yield name, _readable(name, tensor)
        for name, tensor in self._model.named_buffers() if self._buffers else ():
            yield name, _readable(name, tensor)

    def _frozen(self, name: str, tensor: Tensor) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """The rectangles of a tensor that must not move, with the row and column each begins at."""
        part = part_here(self._parts.get(name) or BoundParam(name, tensor, 0, ()))
        matrix = tensor.reshape(matrix_shape(tensor.shape))  # a copy only where it is not contiguous
        for start, stop in complement(part.ranges, matrix.shape[part.dim]):
            yield (start, 0) if part.dim == 0 else (0, start), matrix.narrow(part.dim, start, stop - start)

    @torch.no_grad()
    def _digest(self, name: str, tensor: Tensor) -> list[Tensor]:
        """int64 digests of the rows of all frozen rectangles, and sums that tell their columns apart."""
        rows, columns = [], []
        for _, block in self._frozen(name, tensor):
            for row, column in map(self._sums, _folded(block)):
                rows.append(row)
                columns.append(column)
        empty = torch.empty(0, dtype=torch.int64, device=tensor.device)
        return [torch.cat(parts) if parts else empty for parts in (rows, columns)]

    def _sums(self, block: Tensor) -> tuple[Tensor, Tensor]:
        width = _words(block[:1]).shape[1]
        if self._keys is None or len(self._keys) < width or self._keys.device != block.device:
            self._keys = _keys(max(width, 0 if self._keys is None else len(self._keys)), block.device)
        keys, height = self._keys[:width], max(1, SLAB.get(block.device.type, SLAB["cpu"]) // max(width, 1))
        columns = torch.zeros(width, dtype=torch.int64, device=block.device)
        rows = []
        for slab in block.split(height):
            products = _words(slab).to(torch.int64).mul_(keys)
            rows.append(products.sum(1))
            columns += products.sum(0)
        return torch.cat(rows), columns

    def _locate(self, name: str, tensor: Tensor, rows: Tensor, columns: Tensor) -> Change:
        """Where the digests of a tensor differ, in its own rows and columns."""
        rows, columns = rows.tolist(), columns.tolist()
        moved_rows, moved_columns, at_row, at_column = [], [], 0, 0
        for (top, left), block in self._frozen(name, tensor):
            for piece in _folded(block):
                height, width = len(piece), _words(piece[:1]).shape[1]
                here, across = rows[at_row:at_row + height], columns[at_column:at_column + width]
                at_row, at_column = at_row + height, at_column + width
                unit = piece.shape[1] if block.shape[1] == 1 else 1  # folded: rows of the vector in a row of the piece
                moved_rows += [(top + i * unit, top + (i + 1) * unit) for i, moved in enumerate(here) if moved]
                if block.shape[1] > 1 and any(here):
                    edge = [i * piece.shape[1] // width for i in range(width + 1)]
                    moved_columns += [(left + edge[i], left + max(edge[i + 1], edge[i] + 1))
                                      for i, moved in enumerate(across) if moved]
                top += height * unit if block.shape[1] == 1 else 0
        return Change(name, merge(moved_rows), merge(moved_columns))


# -- words -----------------------------------------------------------------------------------


def _keys(n: int, device: torch.device) -> Tensor:
    """n odd numbers of 64 random bits; always the same ones, so that digests compare."""
    draw = torch.Generator().manual_seed(0x616C7073)
    high, low = torch.randint(-2**31, 2**31, (n, 2), generator=draw, device="cpu").unbind(1)
    return ((high << 32) + (low & 0xFFFFFFFF) | 1).to(device)


def _words(block: Tensor) -> Tensor:
    """The bytes of a [rows, columns] tensor as whole numbers of 32 bits at most, [rows, words]."""
    if block.is_complex():
        block = torch.view_as_real(block).flatten(1)
    size = block.element_size()
    if size == 8 and block.stride(1) != 1:
        block = block.contiguous()
    whole = (block.shape[1] * size % 4 == 0 and block.stride(1) == 1 and block.stride(0) * size % 4 == 0
             and block.storage_offset() * size % 4 == 0)
    return block.view(torch.int32 if whole else {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size])


def _folded(block: Tensor) -> Iterator[Tensor]:
    """The block itself; of a long vector, rows of FOLD elements and what is left."""
    if block.shape[1] != 1 or len(block) < 2**16:
        if block.numel():
            yield block
        return
    vector, whole = block.reshape(-1), len(block) // FOLD * FOLD
    yield vector[:whole].view(-1, FOLD)
    if whole < len(vector):
        yield vector[whole:].view(1, -1)


def _readable(name: str, tensor: Tensor) -> Tensor:
    """What of a tensor is in this process's memory."""
    tensor = local_part(tensor).detach()
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{name} is {tensor.layout} on {tensor.device}: there are no bytes of it to watch")
    return tensor


def _facts(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _said(spans: Ranges) -> str:
    shown = [str(start) if stop == start + 1 else f"{start} to {stop - 1}" for start, stop in spans[:SHOWN]]
    return ", ".join(shown) + (f" and {len(spans) - SHOWN} more places" if len(spans) > SHOWN else "")
