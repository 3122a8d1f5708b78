"""`find_heads`: locate every attention head of a model from its structure.

Walks the modules, takes those whose children are query, key and value projections (by the
children's names), checks the sizes their attributes and weights state against each other, and
refuses where anything is left open. No model class is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .classify import attention_like, is_attention, not_heads
from .head_sizes import Facts, read, solve
from .layout import AttentionLayer, HeadLayout, HeadSlice, LayoutError
from .outputs import find_output
from .packed_qkv import (
    Owned,
    join,
    join_differential_pairs,
    queries_only,
    separate,
    split_fused,
    split_latent,
    split_pair,
)
from .places import kind_of, towers_of
from .projections import Projection, bare, find_projections, projection


def find_heads(model: nn.Module) -> HeadLayout:
    """What every attention head of `model` owns.

    Reads names, shapes and attributes only: the model may be on the meta device. Wrappers
    (`.module`, torch.compile, PEFT adapters) are seen through; of a LoRA layer the base weight
    is what a head owns. A module or a weight used several times is one layer.

    Only attention over positions (or channels) through a softmax has heads here: recurrences
    that also speak of heads (delta rules, lightning attention, state spaces, xLSTM) are left
    out, and so is what no single head owns: biases of output projections, MLA's shared rotary
    key, the selectors of sparse attention ("indexers"), output gates with a projection of their
    own, and the extra projections of global or entity tokens (Longformer, LUKE).

    Raises:
        TypeError: it is no module.
        LayoutError: the model has no attention heads, or some that cannot be located; the
            message names the module and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; expected a torch.nn.Module")
    walk = _Walk(model)
    found = walk.run()
    if walk.problems:
        first, *more = walk.problems
        raise LayoutError(first + (f" (and {len(more)} more modules)" if more else ""))
    if not found:
        raise LayoutError(
            f"{walk.model_type}: no module of this model holds attention heads (query, key and value "
            "projections); state-space models and other recurrences have none"
        )
    towers = towers_of([located.name for located in found])
    layers: list[AttentionLayer] = []
    for index, (at, tower) in enumerate(zip(found, towers, strict=True)):
        kind = kind_of(at.name, walk.modules[at.name], walk.parent(at.name))
        layers.append(
            AttentionLayer(
                index,
                at.name,
                kind,
                tower,
                at.owned.heads,
                at.owned.groups,
                at.owned.group_of,
                at.out.module if at.out.module != at.name else None,
                None if at.reused is None else found.index(at.reused),
            )
        )
    held = {part.param for layer in layers for unit in (*layer.heads, *layer.groups) for part in unit}
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters() if name in held}
    return HeadLayout(tuple(layers), shapes, walk.model_type)


@dataclass(frozen=True, eq=False)
class _Located:
    """One attention module and what its heads own; `reused`: whose keys and values it attends to."""

    name: str
    owned: Owned
    out: Projection
    reused: _Located | None = None


class _Walk:
    """One pass over a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.problems: list[str] = []
        self.found: list[_Located] = []
        self.taken: set[str] = set()
        inner = next((m for m in self.modules.values() if read(m, "config") is not None), model)
        self.config = read(inner, "config")
        self.model_type = read(self.config, "model_type") or type(inner).__name__

    def parent(self, name: str) -> nn.Module | None:
        return self.modules.get(name.rpartition(".")[0]) if name else None

    def run(self) -> list[_Located]:
        """Locate in every module; what looks like attention and was not located is a problem."""
        leftover = []
        for name, module in self.modules.items():
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not_heads(module):
                continue
            roles = find_projections(module, name)
            packed = bare(module, name, self.names)
            if not packed and not is_attention(module, roles):
                if roles.keys() - {"o", "in"} and attention_like(type(module).__name__):
                    leftover.append((name, module, roles))
                continue
            try:
                self._keep(name, module, self._resolve(name, module, roles, packed))
            except LayoutError as error:
                self.problems.append(str(error))
        for name, module, roles in leftover:
            if not any(_nested(name, at.name) or _nested(at.name, name) for at in self.found):
                self.problems.append(
                    f"{name} ({type(module).__name__}): it has projections {_named(roles)}, which are "
                    "not a known set of query, key, value and output"
                )
        return self.found

    def _keep(self, name: str, module: nn.Module, located: _Located) -> None:
        """Raises LayoutError where its weights are partly those of a module located before."""
        units = (*located.owned.heads, *located.owned.groups)
        weights = {part.param for unit in units for part in unit if not part.bias}
        if weights <= self.taken:
            return
        if shared := weights & self.taken:
            raise LayoutError(
                f"{name} ({type(module).__name__}): shares {sorted(shared)} but not all of its projections "
                "with another attention module"
            )
        self.taken |= weights
        self.found.append(located)

    def _resolve(self, name: str, module: nn.Module, roles: dict, packed: dict[str, Projection]) -> _Located:
        """The heads of one attention module.

        Raises:
            LayoutError: its projections are not a known set, or their sizes do not fit.
        """
        facts = Facts([module, self.parent(name), read(module, "config"), self.config])
        get = {
            role: packed.get(role) or self._one(roles, role)
            for role in ("q", "q_gate", "qk", "k", "v", "qkv", "kv", "kv_b", "in")
        }
        keys, values = (self._several(roles, r, packed) for r in ("k", "v"))
        q = get["q"] or get["qk"] or get["q_gate"]
        if "o_a" in roles:
            raise LayoutError(
                f"{name} ({type(module).__name__}): {roles['o_a'][0][0]} is a grouped low-rank output "
                "projection, in which heads of different groups share their columns"
            )
        pair = get["kv"] or (get["qkv"] if q is not None else None)
        if get["kv_b"] is not None and q is not None:
            out = self._output(name, module, packed, lambda o: True)
            return _Located(name, split_latent(name, q, q is get["q_gate"], get["kv_b"], out, facts), out)
        if q is not None and (keys or get["qk"] is not None) or (q is not None and pair is not None):
            keys = keys or ([get["qk"]] if get["qk"] is not None else [])
            return self._separate(name, module, packed, facts, q, keys, values or keys, pair)
        if q is not None:
            return self._reusing(name, module, packed, facts, q)
        fused = get["qkv"] or get["in"]
        if fused is None:
            raise LayoutError(
                f"{name} ({type(module).__name__}): its projections {_named(roles)} are not a known set of "
                "query, key and value"
            )
        out = self._output(name, module, packed, lambda o: o.n_in < fused.n_out)
        return _Located(name, self._biased(module, split_fused(name, module, fused, out, facts)), out)

    def _separate(
        self,
        name: str,
        module: nn.Module,
        packed: dict,
        facts: Facts,
        q: Projection,
        keys: list[Projection],
        values: list[Projection],
        pair: Projection | None,
    ) -> _Located:
        """Separate query, and keys and values apart or packed in one tensor."""
        if (
            type(module).__name__.endswith("AttnBlock")
            and facts.sources[0] is module
            and not _states_heads(module)
        ):
            facts = Facts([_SingleHead()])  # image tokenizers attend with one head and never say so
        half = pair.n_out // 2 if pair is not None else 0
        k, v = (half, half) if pair is not None else (keys[0].n_out, values[0].n_out)
        if any(p.n_out != k for p in keys) or any(p.n_out != v for p in values):
            raise LayoutError(f"{name}: its key or value projections differ in size")

        def fits(out: Projection) -> bool:
            try:
                return bool(solve(name, facts, q=q.n_out, k=k, v=v, o=out.n_in))
            except LayoutError:
                return False

        out = self._output(name, module, packed, fits)
        sizes, wide = solve(name, facts, q=q.n_out, k=k, v=v, o=out.n_in)
        if pair is not None:
            if wide != 1:
                raise LayoutError(f"{name}: its query projection is twice as wide as its heads")
            return _Located(name, split_pair(q, pair, out, sizes), out)
        owned = self._biased(module, separate(q, keys, values, out, sizes, wide))
        return _Located(name, join_differential_pairs(owned) if "lambda_q1" in module._parameters else owned, out)

    def _reusing(self, name: str, module: nn.Module, packed: dict, facts: Facts, q: Projection) -> _Located:
        """A query and an output projection alone: keys and values are another layer's."""
        same = [
            at
            for at in self.found
            if at.owned.groups
            and _stack(at.name) == _stack(name)
            and read(self.modules[at.name], "layer_type") == read(module, "layer_type")
        ]
        source = read(module, "kv_shared_layer_index")
        if type(source) is int:
            same = [at for at in same if read(self.modules[at.name], "layer_idx") == source]
        reused = same[-1] if same else None
        ratio = read(module, "num_key_value_groups") or 1
        per_head = facts.get(("head_dim",)) or 0
        heads = q.n_out // per_head if per_head else 0
        k = heads // ratio * per_head
        out = self._output(name, module, packed, lambda o: True)
        sizes, wide = solve(name, facts, q=q.n_out, k=k, v=k, o=out.n_in)
        if wide != 1 or (reused is not None and len(reused.owned.groups) != sizes.groups):
            raise LayoutError(
                f"{name}: its queries do not fit the keys and values it takes from another layer"
            )
        return _Located(name, queries_only(q, out, sizes), out, reused)

    def _one(self, roles: dict, role: str) -> Projection | None:
        found = roles.get(role, [])
        if len(found) > 1:
            raise LayoutError(
                f"{found[0][0]} and {found[1][0]} both look like the {role} projection of one module"
            )
        return projection(found[0][1], found[0][0], self.names) if found else None

    def _several(self, roles: dict, role: str, packed: dict[str, Projection]) -> list[Projection]:
        if role in packed:
            return [packed[role]]
        return [
            projection(child, path, self.names)
            for path, child in roles.get(role) or roles.get(f"{role}_of", ())
        ]

    def _biased(self, module: nn.Module, owned: Owned) -> Owned:
        """Adds biases of q, k and v that are bare parameters beside a projection without one."""

        def add(units, role: str):
            bias = module._parameters.get(f"{role}_bias")
            if bias is None or bias.ndim != 1 or not units or bias.numel() % len(units):
                return units
            size = bias.numel() // len(units)
            return join(
                units,
                tuple(
                    (HeadSlice(self.names[id(bias)], role, 0, i * size, (i + 1) * size, bias=True),)
                    for i in range(len(units))
                ),
            )

        return Owned(add(owned.heads, "q"), add(add(owned.groups, "k"), "v"), owned.group_of)

    def _output(
        self, name: str, module: nn.Module, packed: dict, fits: Callable[[Projection], bool]
    ) -> Projection:
        return packed.get("o") or find_output(name, module, self.parent(name), self.names, fits)


class _SingleHead:
    num_heads = 1


def _states_heads(module: nn.Module) -> bool:
    return Facts([module]).get(("num_heads", "num_attention_heads", "n_heads")) is not None


def _nested(inner: str, outer: str) -> bool:
    return inner == outer or inner.startswith(outer + ".") or not outer


def _stack(name: str) -> str:
    """The path up to the first number: what the layers of one stack share."""
    words = name.split(".")
    return ".".join(words[: next((i for i, word in enumerate(words) if word.isdigit()), len(words))])


def _named(roles: dict) -> list[str]:
    return sorted(path.rpartition(".")[2] for found in roles.values() for path, _ in found)
