"""`find_heads`: locate every attention head of a model from its structure.

Walks the modules, takes those whose children are query, key and value projections (by the
children's names), checks the sizes their attributes and weights state against each other, and
refuses where anything is left open. No model class is named or imported.
"""

from __future__ import annotations

from torch import nn

from .fused import Facts, Owned, read, separate, solve, split_fused, split_latent, split_pair
from .layout import AttentionLayer, HeadLayout, LayoutError
from .places import kind_of, towers_of
from .projections import Projection, find_projections, output_rank, projection, role_of, unwrap


def find_heads(model: nn.Module) -> HeadLayout:
    """What every attention head of `model` owns.

    Reads names, shapes and attributes only: the model may be on the meta device. Wrappers
    (`.module`, torch.compile, PEFT adapters) are seen through; of a LoRA layer the base weight
    is what a head owns. A module or a weight used several times is one layer.

    Raises:
        LayoutError: the model has no attention heads, or some that cannot be located; the
            message names the module and why.
    """
    walk = _Walk(model)
    found = [layer for name, module in walk.modules.items() if (layer := walk.locate(name, module))]
    if walk.problems:
        first, *more = walk.problems
        raise LayoutError(first + (f" (and {len(more)} more modules)" if more else ""))
    if not found:
        raise LayoutError(f"{walk.model_type}: no module of this model holds attention heads (query, key and value "
                          "projections); state-space models and mixtures of heads have none to select")
    towers = towers_of([name for name, _ in found])
    layers = tuple(
        AttentionLayer(index, name, kind_of(name, walk.modules[name], walk.parent(name)), tower, owned.heads,
                       owned.groups, owned.group_of, None if out is None else out.module)
        for index, ((name, (owned, out)), tower) in enumerate(zip(found, towers, strict=True)))
    held = {part.param for layer in layers for unit in (*layer.heads, *layer.groups) for part in unit}
    return HeadLayout(layers, {n: tuple(p.shape) for n, p in model.named_parameters() if n in held}, walk.model_type)


class _Walk:
    """One pass over a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.names = {id(param): name for name, param in model.named_parameters()}
        self.problems: list[str] = []
        self.taken: set[str] = set()
        inner = next((m for m in self.modules.values() if read(m, "config") is not None), model)
        self.config = read(inner, "config")
        self.model_type = read(self.config, "model_type") or type(inner).__name__

    def parent(self, name: str) -> nn.Module | None:
        return self.modules.get(name.rpartition(".")[0]) if name else None

    def locate(self, name: str, module: nn.Module) -> tuple[str, tuple[Owned, Projection | None]] | None:
        """The module's heads, or None where it has none, or (noted in `problems`) cannot be located."""
        roles = find_projections(module, name)
        if not _is_attention(module, roles):
            return None
        try:
            owned, out = self._resolve(name, module, roles)
        except LayoutError as error:
            self.problems.append(str(error))
            return None
        weights = {part.param for unit in (*owned.heads, *owned.groups) for part in unit if not part.bias}
        if weights <= self.taken:
            return None
        if shared := weights & self.taken:
            self.problems.append(f"{name} ({type(module).__name__}): shares {sorted(shared)} but not all of its "
                                 "projections with another attention module")
            return None
        self.taken |= weights
        return name, (owned, out)

    def _one(self, roles: dict, role: str) -> Projection | None:
        found = roles.get(role, [])
        if len(found) > 1:
            raise LayoutError(f"{found[0][0]} and {found[1][0]} both look like the {role} projection of one module")
        return projection(found[0][1], found[0][0], self.names) if found else None

    def _resolve(self, name: str, module: nn.Module, roles: dict) -> tuple[Owned, Projection | None]:
        facts = Facts([module, self.parent(name), read(module, "config"), self.config])
        one = {role: self._one(roles, role) for role in ("q", "k", "v", "qkv", "kv", "kv_b", "in")}
        fused = one["qkv"] or one["in"]
        if one["kv_b"] is not None and one["q"] is not None:
            out = self._output(name, module, None)
            if out is None:
                raise LayoutError(f"{name}: no output projection beside its latent key/value projection")
            return split_latent(name, one["q"], one["kv_b"], out, facts), out
        if one["q"] is not None and one["k"] is not None and one["v"] is not None:
            q, k, v = one["q"], one["k"], one["v"]
            out = self._output(name, module, lambda o: _fits(facts, q, k, v, o))
            sizes, wide = solve(name, facts, q=q.n_out, k=k.n_out, v=v.n_out, o=out.n_in if out else None)
            return separate(q, k, v, out, sizes, wide), out
        pair = one["kv"] or (one["qkv"] if one["q"] is not None else None)
        if one["q"] is not None and pair is not None:
            half = pair.n_out // 2
            q = one["q"]
            out = self._output(name, module, lambda o: _fits(facts, q, None, None, o, half))
            sizes, wide = solve(name, facts, q=q.n_out, k=half, v=half, o=out.n_in if out else None)
            if wide != 1:
                raise LayoutError(f"{name}: the query projection is {wide} times as wide as its heads")
            return split_pair(q, pair, out, sizes), out
        if fused is not None:
            out = self._output(name, module, lambda o: o.n_in < fused.n_out)
            return split_fused(name, module, fused, out, facts), out
        raise LayoutError(f"{name} ({type(module).__name__}): its projections {sorted(roles)} are not a known set of "
                          "query, key and value")

    def _output(self, name: str, module: nn.Module, fits) -> Projection | None:
        """The output projection: a child, a child's child, or beside the module in its attention block."""
        found = self._outputs_in(module, name)
        parent = self.parent(name)
        if not found and parent is not None and _attention_like(type(parent).__name__):
            found = self._outputs_in(parent, name.rpartition(".")[0], but=module)
        fitting = [out for out in found if fits is None or fits(out)]
        return fitting[0] if fitting else None

    def _outputs_in(self, module: nn.Module, name: str, but: nn.Module | None = None) -> list[Projection]:
        ranked = []
        for key, child in module._modules.items():
            if child is None or child is but or role_of(key) != "o":
                continue
            path = f"{name}.{key}" if name else key
            inner, _ = unwrap(child, path)
            deeper = [] if hasattr(inner, "weight") else [
                (output_rank(sub), f"{path}.{sub}", part) for sub, part in child._modules.items()
                if role_of(sub) == "o" and not isinstance(part, nn.Dropout)]
            ranked += deeper or [(output_rank(key), path, child)]
        ranked.sort(key=lambda item: item[0])
        return [projection(part, path, self.names) for _, path, part in ranked
                if any(True for _ in part.parameters()) or any(True for _ in part.buffers())]


def _fits(facts: Facts, q: Projection, k, v, out: Projection, half: int = 0) -> bool:
    try:
        solve("", facts, q=q.n_out, k=k.n_out if k else half, v=v.n_out if v else half, o=out.n_in)
    except LayoutError:
        return False
    return True


def _attention_like(class_name: str) -> bool:
    return "attention" in class_name.lower() or "attn" in class_name.lower()


def _is_attention(module: nn.Module, roles: dict) -> bool:
    """Query, key and value are among the children, and nothing says that it is something else."""
    has = roles.keys()
    if not ({"q", "k", "v"} <= has or {"q", "kv"} <= has or {"q", "kv_b"} <= has or "qkv" in has
            or ("in" in has and _attention_like(type(module).__name__))):
        return False
    return not is_linear_attention(module)


def is_linear_attention(module: nn.Module) -> bool:
    """A recurrence (delta rule, state space, lightning): no softmax over positions, no heads to select."""
    kind = type(module).__name__.lower()
    marks = ("A_log", "conv1d", "forget_gate", "slope_rate", "q_conv1d")
    return any(word in kind for word in ("delta", "lightning", "linearattention", "mamba")) or any(
        hasattr(module, mark) for mark in marks)
