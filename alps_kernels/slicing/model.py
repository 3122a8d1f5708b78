"""`slice_heads`: train a selection's slices as parameters of their own, so that only they have gradients."""

from __future__ import annotations

from torch import nn

from ..layout import HeadLayout, find_heads
from ..selection import REST, BoundSelection, HeadSelection, bind_full, remember, remembered
from ..tensors import LEAF_SUFFIX, SyncedSlice, check_choice, check_type, sync_weights, synced_slices_in
from .find import Place, find_places, product_of
from .projection import Sliced, TrainedRanges, sliced_class

_BEFORE = "_alps_trained_before"  # on the model: which parameters required grad before it was sliced


def slice_heads(model: nn.Module, heads: HeadSelection, *, rest: str = "frozen",
                layout: HeadLayout | None = None) -> BoundSelection:
    """Make the selected slices of `model` leaf parameters of their own, so that backward forms nothing else of dW.

    A projection that holds some of them stays the same module with the same full `weight`, and
    computes the same; its class becomes a subclass that keeps them in one parameter more,
    `weight_slice` ([n_sel, d] for rows, [d, n_sel] for columns, of the weight as stored), and
    `bias_slice` where a bias is cut. The leaf is what trains; the full weight is made current
    before it is used, after a step of any optimizer. A parameter all of which trains stays as it
    is. Everything else is frozen, or trains with `rest="trainable"` (all but the other heads).

    Slicing anew starts from the current weights; the leaves are new parameters then, unless the
    selection is the one that the model is sliced for. Do it before DDP, FSDP2 or torch.compile,
    and before the optimizer is made.

    Args:
        model: holds the heads in `nn.Linear` or transformers' `Conv1D` modules.
        heads: what trains.
        rest: "frozen" or "trainable", see `HeadSelection.freeze`.
        layout: the model's layout where it is already known.

    Returns:
        The leaves, bound: `HeadAdamW(model.parameters(), heads=slice_heads(model, heads))`.

    Raises:
        LayoutError: the heads cannot be located, or a projection cannot be sliced (it has a forward
            of its own: adapters, quantised weights, nn.MultiheadAttention; its weight is tied to
            another module's); it is named, and nothing has changed.
        ValueError: the selection is of another model.
        TypeError: `heads` is no HeadSelection.
    """
    check_type("heads", heads, HeadSelection, "a HeadSelection")
    check_choice("rest", rest, REST)
    layout = find_heads(model) if layout is None else layout
    bound = bind_full(heads, model, rest, layout)
    places = find_places(model, bound)
    before, known = _before(model), remembered(model)
    sliced = before is not None
    flags = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    try:
        if not _is_sliced_so(model, places):
            _check_whole(model)
            sync_weights(model)
            leaves = [_leaves(place) for place in places]  # what may fail for want of memory, before anything changes
            _restore(model)
            before = {name: param.requires_grad for name, param in model.named_parameters()}
            for place, made in zip(places, leaves, strict=True):
                _slice(place, made)
        model.__dict__[_BEFORE] = before
        remember(model, (heads, rest))
        bound = heads.bind(model, rest=rest, layout=layout)
        trained = {id(part.param) for part in bound.params}
        for param in model.parameters():
            if param.is_floating_point():
                param.requires_grad_(id(param) in trained)
                if not param.requires_grad:
                    param.grad = None  # clip_grad_norm_ would count it
    except BaseException:
        _undo(model, flags, sliced, before, known)
        raise
    return bound


def _undo(model: nn.Module, flags: list[tuple], sliced: bool, before: dict[str, bool] | None,
          known: tuple[HeadSelection, str] | None) -> None:
    """After an error on the way: the model is what it was, or a plain model where it was sliced in another way."""
    if not sliced or [id(param) for param, _, _ in flags] != [id(param) for param in model.parameters()]:
        model.__dict__[_BEFORE] = before or {}
        _restore(model)
        if sliced:
            return remember(model, None)
    for param, trains, grad in flags:
        param.requires_grad_(trains)
        param.grad = grad
    remember(model, known)


def unslice_heads(model: nn.Module) -> nn.Module:
    """Give the projections their plain classes back, with the trained weights and `requires_grad` as it was.

    Raises:
        ValueError: the model is not sliced, or it is sharded now.
    """
    if _before(model) is None:
        raise ValueError("this model is not sliced")
    _check_whole(model)
    sync_weights(model)
    _restore(model)
    return model


def _check_whole(model: nn.Module) -> None:
    """Raises ValueError where sliced parameters are sharded, or their modules' classes are changed."""
    for name, module in model.named_modules():
        if isinstance(module, Sliced) and (type(module) is not sliced_class(module.plain_class) or any(
                type(param) is not nn.Parameter for param in module._parameters.values() if param is not None)):
            raise ValueError(f"{name} ({type(module).__name__}) is sharded or wrapped since it was sliced; "
                             "take its state_dict() into a plain model instead")


def _restore(model: nn.Module) -> None:
    """Undo `slice_heads`, whatever of it there is; the weights are current."""
    before = _before(model) or {}
    for module in [module for module in model.modules() if "_synced" in module.__dict__]:
        for name, synced in module._synced.items():
            module._parameters.pop(name + LEAF_SUFFIX, None)
            synced.weight.requires_grad_(synced.trained_before)
        module.__class__ = getattr(module, "plain_class", type(module))
        del module._synced, module._trained
    for name, param in model.named_parameters():
        if name in before:
            param.requires_grad_(before[name])
    for module in model.modules():
        module.__dict__.pop(_BEFORE, None)


def _before(model: nn.Module) -> dict[str, bool] | None:
    """What `slice_heads` noted of the model, by names in it; also where it was wrapped before or since."""
    for prefix, module in model.named_modules():
        if (noted := module.__dict__.get(_BEFORE)) is not None:
            return {f"{prefix}.{name}" if prefix else name: value for name, value in noted.items()}
    return {} if any(True for _ in synced_slices_in(model)) else None


def _leaves(place: Place) -> dict[str, nn.Parameter]:
    """The trained slices of a projection's parameters, which are current."""
    return {name: nn.Parameter(SyncedSlice(place.module, name, part.dim, part.ranges, True).cut(part.param))
            for name, part in place.parts.items()}


def _slice(place: Place, leaves: dict[str, nn.Parameter]) -> None:
    module, parts, plain_class = place.module, place.parts, type(place.module)
    product, ranges = product_of(plain_class), {name: part.ranges for name, part in parts.items()}
    outputs = "weight" in parts and (parts["weight"].dim == 0) == (product != "addmm")
    trained = TrainedRanges(product, outputs, ranges.get("weight"), ranges.get("bias"))
    synced = {name: SyncedSlice(module, name, part.dim, part.ranges, part.param.requires_grad)
              for name, part in parts.items()}
    module._trained, module._synced = trained, synced
    module.__class__ = sliced_class(plain_class)
    for name, one in synced.items():
        module.register_parameter(name + LEAF_SUFFIX, leaves[name])
        one.adopt()
        one.written(leaves[name])


def _is_sliced_so(model: nn.Module, places: list[Place]) -> bool:
    """The model is sliced, and into these very slices."""
    now = {(id(m.module), m.name): (m.dim, m.ranges) for _, m in synced_slices_in(model)}
    then = {(id(place.module), name): (part.dim, part.ranges)
            for place in places for name, part in place.parts.items()}
    return bool(now) and now == then
