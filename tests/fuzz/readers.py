"""Coverage-guided fuzzing of the readers of files: python -m tests.fuzz.readers {heads,scores,tensors,patch,index} [-runs=N].

Needs atheris, which the tests do not: pip install --target FOLDER atheris, then PYTHONPATH=FOLDER.
A reader may refuse a file (ValueError, TypeError of a saved file never) or read it; everything else
is a finding, and libFuzzer writes the input that showed it.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

SEEDS = Path(tempfile.mkdtemp())
FILE = SEEDS / "input"


def read_heads(data: bytes) -> None:
    """A file of heads; what is read is written and read again, unchanged."""
    from alps_kernels.selection import HeadSelection

    path = FILE.with_suffix(".json")
    path.write_bytes(data)
    heads = HeadSelection.load(path)
    heads.save(path)
    if HeadSelection.load(path) != heads:
        raise AssertionError("saved and loaded, the selection is another")


def read_scores(data: bytes, suffix: str = ".json") -> None:
    """A file of scores; what is read is written and read again, unchanged."""
    import torch

    from alps_kernels.scoring import HeadScores

    path = FILE.with_suffix(suffix)
    path.write_bytes(data)
    scores = HeadScores.load(path)
    scores.save(path)
    if not torch.equal(HeadScores.load(path).tensor, scores.tensor):
        raise AssertionError("saved and loaded, the scores are others")
    str(scores)


def read_tensors(data: bytes) -> None:
    """Scores in safetensors."""
    read_scores(data, ".safetensors")


def read_patch(data: bytes) -> None:
    """A head patch."""
    from alps_kernels.patching import HeadPatch

    path = FILE.with_suffix(".safetensors")
    path.write_bytes(data)
    HeadPatch.load(path)


def read_index(data: bytes) -> None:
    """The index of a checkpoint's shards: it may name files that are not there, never files elsewhere."""
    from alps_kernels.weights import TensorFiles

    path = FILE.with_name("model.safetensors.index.json")
    path.write_bytes(data)
    if any(file.parent != path.parent for file in TensorFiles(path).files.values()):
        raise AssertionError("a shard outside the folder")


TARGETS = {"heads": read_heads, "scores": read_scores, "tensors": read_tensors, "patch": read_patch, "index": read_index}


def seeds(target: str, folder: Path) -> None:
    """A whole file to begin with."""
    import alps_kernels as alps

    folder.mkdir()
    if target == "heads":
        alps.HeadSelection([(0, 1)], [2, 4], provenance={"a": [1.5, None]}).save(folder / "a.json")
    elif target in ("scores", "tensors"):
        alps.HeadScores([1.0, 2.0], [0], [2], metric="pad", provenance={}).save(folder / ("a.json" if target == "scores" else "a.safetensors"))
    elif target == "patch":
        from tests.reliability.models import some_heads, tiny

        model = tiny(num_hidden_layers=1, hidden_size=8, intermediate_size=4, vocab_size=5)
        alps.save_patch(model, folder / "a.safetensors", some_heads(model))
    else:
        (folder / "a.json").write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}')


def attempt(target: str, data: bytes) -> bool:
    """Whether the reader took these bytes; raises what a reader may not raise."""
    try:
        TARGETS[target](data)
    except ValueError:
        return False
    except FileNotFoundError:
        if target != "index":
            raise
        return False
    return True


def main() -> None:
    import atheris

    warnings.simplefilter("ignore")
    target = sys.argv.pop(1)
    import torch  # noqa: F401  not instrumented: only our own code is
    import transformers  # noqa: F401

    with atheris.instrument_imports(include=["alps_kernels"]):
        import alps_kernels.patching.patch
        import alps_kernels.scoring.scores
        import alps_kernels.selection.selection  # noqa: F401
    corpus = SEEDS / "corpus"
    seeds(target, corpus)
    atheris.Setup([*sys.argv, f"-artifact_prefix={os.getcwd()}/", str(corpus)], lambda data: attempt(target, data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
