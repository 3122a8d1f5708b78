"""The weights of a model or of a checkpoint on disk, through one protocol, streamed. Imports: tensors, layout."""

from .checkpoint import Checkpoint, open_checkpoint
from .match import match_layers
from .tensor_files import PICKLE_SUFFIXES, TensorFiles, TensorInfo
from .weights import ModelWeights, Weights, canonical, unwrap_model

__all__ = [
    "Checkpoint", "ModelWeights", "PICKLE_SUFFIXES", "TensorFiles", "TensorInfo", "Weights", "canonical",
    "match_layers", "open_checkpoint", "unwrap_model",
]
