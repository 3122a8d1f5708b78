"""`import alps_kernels` brings nothing along but itself, and a face nothing but torch and einops."""

import subprocess
import sys
from functools import lru_cache
from importlib import import_module

import pytest

import alps_kernels
from tests.house.rules import ROOMS

FACES = [room for room in ROOMS if room != "csrc_triton"]
LIGHT = [room for room in FACES if room not in ("integrations", "demo", "cli")]


@lru_cache(maxsize=None)
def loaded(code: str) -> frozenset[str]:
    """Every module that is there after `code`, in a process of its own."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return frozenset(run.stdout.split())


def packages(code: str) -> set[str]:
    """The installed packages of which `code` imports what `import torch` does not."""
    return {module.split(".")[0] for module in loaded(code) - loaded("import torch")} - set(sys.stdlib_module_names)


def test_it_imports_nothing_that_torch_does_not_import():
    assert loaded("import torch, alps_kernels") - loaded("import torch") == {"alps_kernels", "alps_kernels.version"}


@pytest.mark.parametrize("room", LIGHT)
def test_a_face_imports_nothing_heavy(room):
    assert packages(f"import alps_kernels.{room}") <= {"alps_kernels", "einops", "torch"}


def test_the_names_that_need_torch_need_neither_triton_nor_transformers():
    names = [name for name, room in alps_kernels._HOMES.items() if room in LIGHT]
    code = f"import alps_kernels\nfor name in {names}: getattr(alps_kernels, name)"
    assert len(names) > 15 and packages(code) <= {"alps_kernels", "einops", "torch"}


@pytest.mark.parametrize("room", FACES)
def test_a_face_has_every_name_that_it_exports(room):
    face = import_module(f"alps_kernels.{room}")
    assert face.__all__ and all(getattr(face, name) is not None for name in face.__all__)


def test_every_public_name_is_there():
    for name in alps_kernels.__all__:
        assert getattr(alps_kernels, name) is not None
    assert set(alps_kernels.__all__) <= set(dir(alps_kernels))
