"""The weights of a model or of a checkpoint on disk, through one protocol, streamed. Imports: tensors, layout."""

from .checkpoint import Checkpoint, open_checkpoint
from .tensor_files import PICKLES, TensorFiles
from .weights import ModelWeights, Weights, match_layers

__all__ = ["Checkpoint", "ModelWeights", "PICKLES", "TensorFiles", "Weights", "match_layers", "open_checkpoint"]
