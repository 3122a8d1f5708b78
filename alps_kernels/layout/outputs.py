"""Which linear map takes what the heads of an attention module put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .classify import attention_like
from .layout import LayoutError
from .projections import Projection, output_rank, projection, role_of, unwrap


def find_output(
    name: str,
    module: nn.Module,
    parent: nn.Module | None,
    names: Mapping[int, str],
    fits: Callable[[Projection], bool],
) -> Projection:
    """The output projection: a child, a child's child, or beside the module in its attention block.

    Args:
        name, module, parent: the attention module and the module around it.
        names: parameter names by `id`.
        fits: whether a candidate's input divides into the module's heads.

    Raises:
        LayoutError: there is no such child, or none that fits the heads.
    """
    found = _candidates(module, name, names)
    if not found and parent is not None:
        found = _candidates(parent, name.rpartition(".")[0], names, beside=module)
    for out in found:
        if fits(out):
            return out
    if not found:
        why = "no output projection was found, so what its heads write is unknown"
    else:
        why = (
            f"its output projection {found[0].module} takes {found[0].n_in} features, "
            "which do not divide into its heads"
        )
    raise LayoutError(f"{name} ({type(module).__name__}): {why}")


def _candidates(
    module: nn.Module, name: str, names: Mapping[int, str], beside: nn.Module | None = None
) -> list[Projection]:
    """Those among the children of `module`, the best named first; `beside`: the attention core."""
    inside = beside is None or attention_like(type(module).__name__)
    ranked = []
    for key, child in module._modules.items():
        path = f"{name}.{key}" if name else key
        if child is None or child is beside or not any(True for _ in child.parameters()):
            continue
        if inside and role_of(key) == "o":
            inner, _ = unwrap(child, path)
            deeper = (
                []
                if hasattr(inner, "weight")
                else [
                    (output_rank(sub), f"{path}.{sub}", part)
                    for sub, part in child._modules.items()
                    if role_of(sub) == "o" and any(True for _ in part.parameters())
                ]
            )
            ranked += deeper or [(output_rank(key), path, child)]
        elif not inside and key == "post_attention":  # an attention module without a block of its own
            ranked += [(0, f"{path}.{sub}", part) for sub, part in child._modules.items() if sub == "conv1d"]
    ranked.sort(key=lambda item: item[0])
    return [projection(part, path, names) for _, path, part in ranked]
