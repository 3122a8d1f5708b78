"""Every tensor that the package makes names its device; floating-point ones name their dtype too.

torch.set_default_device and torch.set_default_dtype change what a call means that does not.
tests/reliability/test_default_device.py runs the public calls under both.
"""

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

ROOT = Path(__file__).resolve().parent.parent.parent / "alps_kernels"
MAKERS = {maker.__name__ for maker in _device_constructors()}
# Without a dtype these make floating-point tensors; what they copy or count decides for the others.
FLOATS = {"empty", "ones", "zeros", "eye", "rand", "randn", "linspace"}


def unnamed(source: str) -> list[str]:
    """The makers of tensors in a source that leave their device or dtype to torch's defaults, by line."""
    tree = ast.parse(source)
    calls = {id(node.func): {word.arg for word in node.keywords} for node in ast.walk(tree)
             if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and node.attr in MAKERS:
            named = calls.get(id(node), set())  # map(torch.tensor, ...) names nothing
            for word in ("device", "dtype") if node.attr in FLOATS else ("device",):
                if word not in named:
                    found.append(f"{node.lineno}: torch.{node.attr} without {word}=")
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_tensor_names_its_device(file):
    assert not unnamed(file.read_text())


@pytest.mark.parametrize("line, found", [
    ("torch.zeros(3, dtype=torch.float64)", ["device"]), ("torch.zeros(3, device=d)", ["dtype"]),
    ("map(torch.tensor, rows)", ["device"]), ("torch.arange(3, device=d)", []), ("x.new_zeros(3)", []),
    ("torch.zeros_like(x)", []), ("torch.zeros(3, dtype=torch.int8, device='cpu')", []),
])
def test_a_call_that_names_nothing_is_found(line, found):
    assert [problem.split()[-1].removesuffix("=") for problem in unnamed(line)] == found
