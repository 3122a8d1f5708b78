"""`score_heads`: how far a task moved every attention head (ALPS, steps 1 and 2)."""

from __future__ import annotations

import math
import os
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import AttentionLayer
from ..ops import METRICS, head_delta, head_delta_projection
from ..tensors import check_choice
from ..version import __version__
from ..weights import ModelWeights, Weights, match_layers
from .representations import REPRESENTATIONS, Piece, check_projection, pieces
from .scores import HeadScores

ModelOrPath = nn.Module | ModelWeights | str | os.PathLike


@torch.no_grad()
def score_heads(
    base: ModelOrPath,
    task: ModelOrPath,
    *,
    metric: str | Sequence[str] = "pad",
    representation: str = "projection",
    temperature: float = 1.0,
    attention: str | Sequence[int] = "all",
    device: str | torch.device | None = None,
    progress: bool = False,
    config: Any = None,
    distributed: Any = False,
) -> HeadScores | dict[str, HeadScores]:
    """Score every attention head by the distance between its weights in two models.

    Each head's weights become a distribution, softmax(W / temperature) over all elements of the
    representation; the score is a distance between the base's and the task's (paper, eq. 5 and 6).

    Args:
        base, task: models in memory, checkpoint folders or single files (.safetensors, .bin,
            .gguf). Of checkpoints only attention weights are read, a layer at a time; a GGUF,
            or a checkpoint whose weights transformers must convert, is loaded whole. The two
            may have different head modules and name prefixes.
        metric: one of `METRICS`, or several: a dict of scores then, from one read.
        representation: "projection": W_h = q_h^T k_g v_g^T, [d, d_v]. "qkv", "q", "k", "v",
            "o", "qkvo": those matrices, flattened and concatenated. Of latent attention (MLA)
            q is the part without position in "projection", and the rotary rows too elsewhere.
            Biases and output gates do not count.
        temperature: of the softmax, positive.
        attention: which attention layers, see `HeadLayout.where`.
        device: where to compute; default: where the base's weights are, the CPU for checkpoints.
        progress: show a bar over layers.
        config: used instead of both checkpoints' config.json: a path, dict or PretrainedConfig.
        distributed: True, or a torch.distributed process group: of n ranks each reads and scores
            every n-th layer, and all return the same scores, those of one process. A collective.

    Raises:
        LayoutError: heads cannot be located, or the models are not of one architecture.
        ValueError: an unknown option, the same model twice, a missing or quantised weight, or a
            non-finite one among those compared. Each names the tensor and the model or file.
        FileNotFoundError: no such checkpoint, or a shard of it is missing.
    """
    metrics = _checked(metric, representation, temperature)
    where = None if device is None else _device(device)

    def work(rank: int, ranks: int) -> _Scored:
        return _score(base, task, metrics, representation, temperature, attention, where, progress and rank == 0,
                      config, slice(rank, None, ranks))

    if distributed is False:
        parts = [work(0, 1)]
    else:
        from ..tensors import on_all_ranks, process_group

        parts = on_all_ranks(process_group(distributed), work)
    one = _joined(parts)
    if one.identical:
        names = [model["name"] for model in one.provenance["models"].values()]
        warnings.warn(f"{' and '.join(names)} have identical attention weights: every score is zero", stacklevel=3)
    scores = {}
    for name in metrics:
        values = torch.cat(one.found[name])
        scores[name] = HeadScores(
            torch.zeros_like(values) if one.identical else values, one.chosen, one.heads_per_layer, metric=name,
            representation=representation, temperature=temperature, summary=one.summary, provenance=one.provenance)
    return scores[metric] if isinstance(metric, str) else scores


@dataclass
class _Scored:
    """Scores of some of the chosen layers, and what is to be said of all.

    Attributes:
        found: by metric, the scores of each of those layers' heads.
        chosen, heads_per_layer, summary: of the whole model.
        identical: the two models' weights of those layers are equal.
    """

    found: dict[str, list[Tensor]]
    chosen: tuple[int, ...]
    heads_per_layer: tuple[int, ...]
    summary: list
    identical: bool
    provenance: dict[str, Any]


def _joined(parts: list[_Scored]) -> _Scored:
    """The parts of n ranks, the i-th of which has every n-th layer from layer i on."""
    if len(parts) == 1:
        return parts[0]
    first, n = parts[0], len(parts)
    found = {name: [parts[i % n].found[name][i // n] for i in range(len(first.chosen))] for name in first.found}
    for which, model in first.provenance["models"].items():
        model["dtypes"] = sorted({dtype for part in parts for dtype in part.provenance["models"][which]["dtypes"]})
    return replace(first, found=found, identical=all(part.identical for part in parts))


def _score(base: ModelOrPath, task: ModelOrPath, metrics: tuple[str, ...], representation: str, temperature: float,
           attention: str | Sequence[int], where: torch.device | None, progress: bool, config: Any,
           share: slice) -> _Scored:
    """Read and score the share of the chosen layers; of the others the sizes alone are looked at."""
    first, second = _open(base, task, config)
    rename = match_layers(first, second)
    layers = first.layout.layers
    chosen = first.layout.where(attention)
    plan = [(layers[i], pieces(layers, layers[i], representation)) for i in chosen]
    params = _params(plan)
    first.prepare(params)
    second.prepare(rename(name) for name in params)

    plan = plan[share]
    reader = _Reader(first, second, rename, where)
    found: dict[str, list[Tensor]] = {name: [] for name in metrics}
    for batch in _bar(_batches(plan, reader), progress):
        for name, values in _scores_of(batch, reader, metrics, representation, temperature).items():
            found[name] += values.split([layer.n_heads for layer, _ in batch])
    layout = first.layout
    return _Scored(found, chosen, layout.heads_per_layer, layout.summary(), reader.identical, reader.provenance())


def _scores_of(batch: Plan, reader: _Reader, metrics: tuple[str, ...], representation: str,
               temperature: float) -> dict[str, Tensor]:
    """The scores of the heads of some layers, whose weights are let go of with it."""
    base, task = reader.read(batch)
    segments = [tuple(piece.segment(base, task, reader.rename) for piece in parts) for _, parts in batch]
    if representation == "projection":
        for (layer, _), triple in zip(batch, segments, strict=True):
            check_projection(layer, triple)
    compute = head_delta_projection if representation == "projection" else head_delta
    try:
        values = compute(segments, metrics, temperature=temperature)
    except ValueError:
        reader.refuse_unsound(base, task)
        raise
    reader.identical = reader.identical and not any(of.any() for of in values.values()) and reader.equal(base, task)
    return values


def _checked(metric: str | Sequence[str], representation: str, temperature: float) -> tuple[str, ...]:
    if not isinstance(metric, (str, list, tuple)):
        raise TypeError(f"metric is {metric!r}; expected the name of a metric, or a list of names")
    metrics = (metric,) if isinstance(metric, str) else tuple(metric)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metric is {unknown[0]!r}; expected one of {tuple(METRICS)}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metric is {metric!r}; expected one metric or several different ones")
    check_choice("representation", representation, REPRESENTATIONS)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}; expected a positive number")
    return metrics


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, dtype=torch.float32, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises any of them, by its build
        said = (str(error).splitlines() or ["it is not known"])[0]
        raise ValueError(f"cannot compute on device {device!r}: {said}") from error


def _open(base: ModelOrPath, task: ModelOrPath, config: Any) -> tuple[Weights, Weights]:
    for which, source in (("base", base), ("task", task)):
        if not isinstance(source, ModelOrPath):
            raise TypeError(f"{which} is a {type(source).__name__}; expected a model or the path of a checkpoint")
    if base is task:
        raise ValueError("base and task are the same object: give the model before and after the task "
                         "(copy.deepcopy keeps one)")
    here = (nn.Module, ModelWeights)
    paths = [None if isinstance(source, here) else os.path.realpath(source) for source in (base, task)]
    if paths[0] is not None and paths[0] == paths[1]:
        raise ValueError(f"base and task are the same checkpoint, {os.fspath(base)}")
    opened = []
    for source, other in ((base, task), (task, base)):
        if isinstance(source, here):
            opened.append(ModelWeights(source, cached_layout=True) if isinstance(source, nn.Module) else source)
        else:
            from ..weights import open_checkpoint

            opened.append(open_checkpoint(source, config=config, like=None if isinstance(other, here) else other))
    return opened[0], opened[1]


_version = cache(version)  # which parses a file
TOGETHER = 2**24  # elements: starting threads costs as much as a small layer, of which a model has dozens
Plan = list[tuple[AttentionLayer, list[Piece]]]


def _params(plan: Plan) -> list[str]:
    """The parameters that the pieces lie in, each once."""
    return sorted({name for _, parts in plan for piece in parts for name in piece.params})


def _batches(plan: Plan, reader: _Reader) -> list[Plan]:
    """Neighbouring layers of as many elements as the reader takes together, or one layer."""
    batches, most, room = [], reader.together, -1.0
    for entry in plan:
        size = sum(math.prod(reader.base.layout.shapes[name]) for name in _params([entry]))
        if size > room:
            batches.append([])
            room = most
        batches[-1].append(entry)
        room -= size
    return batches


def _bar(batches: list[Plan], progress: bool) -> Iterable[Plan]:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="scoring", unit="part")


class _Reader:
    """Reads both models' weights of some layers."""

    def __init__(self, base: Weights, task: Weights, rename: Callable[[str], str],
                 device: torch.device | None) -> None:
        self.base, self.task, self.rename, self.device = base, task, rename, device
        self.identical = True
        self._dtypes: dict[str, set[str]] = {"base": set(), "task": set()}

    @property
    def together(self) -> float:
        """Elements of weights for one call: all if they are on the GPU that computes, some if none must be moved."""
        if not (self.base.in_memory and self.task.in_memory):
            return 0
        held = {tensor.device for weights in (self.base, self.task)
                for tensor in weights.read(weights.layout.shapes).values()}
        if len(held | ({self.device} if self.device else held)) > 1:
            return 0
        return math.inf if held.pop().type == "cuda" else TOGETHER

    def read(self, batch: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The base's and the task's weights of the batch by name, on the device that computes."""
        names = _params(batch)
        base = self._read("base", self.base, names)
        task = self._read("task", self.task, [self.rename(name) for name in names])
        return base, {self.rename(name): task[self.rename(name)].to(base[name].device) for name in names}

    def _read(self, which: str, weights: Weights, names: list[str]) -> dict[str, Tensor]:
        tensors = {name: tensor.to(self.device or tensor.device) for name, tensor in weights.read(names).items()}
        self._dtypes[which] |= {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        return tensors

    def equal(self, base: dict[str, Tensor], task: dict[str, Tensor]) -> bool:
        pairs = ((one, task[self.rename(name)]) for name, one in base.items())
        return all(torch.equal(one.to(wide := torch.promote_types(one.dtype, other.dtype)), other.to(wide))
                   for one, other in pairs)

    def refuse_unsound(self, base: dict[str, Tensor], task: dict[str, Tensor]) -> None:
        """Raises ValueError if a weight is NaN or infinite. The scores show that; this finds the tensor to name."""
        for which, weights, tensors in (("base", self.base, base), ("task", self.task, task)):
            for name, tensor in tensors.items():
                if bad := int((~tensor.isfinite()).sum()):
                    raise ValueError(f"{name} of the {which} model ({weights.name}) holds {bad} NaN or infinite "
                                     "weights")

    def provenance(self) -> dict[str, Any]:
        """What a file of scores says of where they are from; no path but what the user called it."""
        models = {which: {"name": weights.name, "model_type": weights.layout.model_type,
                          "dtypes": sorted(self._dtypes[which]), "streamed": not weights.in_memory}
                  for which, weights in (("base", self.base), ("task", self.task))}
        versions = {"alps_kernels": __version__, "torch": torch.__version__, "transformers": _version("transformers"),
                    "python": platform.python_version()}
        return {"models": models, "versions": versions,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
