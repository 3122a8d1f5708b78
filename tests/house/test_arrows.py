"""Every rule of the house holds, and is reported where it is broken: each is broken once, in a copy."""

import shutil
from pathlib import Path

import pytest

from tests.house.rules import House, exported, imports, violations

ROOT = Path(__file__).resolve().parents[2]


def also(*rooms: str):
    """A face whose first line lists these rooms too."""
    return lambda text: text.replace("Imports: ", f"Imports: {', '.join(rooms)}, ", 1)


def lazily(line: str) -> str:
    return f"def f():\n    {line}\n"


def for_types(line: str) -> str:
    return f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {line}\n"


def face(room: str) -> str:
    return f"alps_kernels/{room}/__init__.py"


def new(room: str) -> str:
    return f"alps_kernels/{room}/planted.py"


A, B, C = (f"alps_kernels/tensors/planted{part}.py" for part in ("", "_b", "_c"))
DEVICE, P = "csrc_triton/planted.py", new("patching")
PAST = f"{P}:1: imports alps_kernels."
# What has to be said, and of what: texts of files, or edits of the texts that they have.
PLANTED = {
    "an import of a room below": (f"{A}:1: tensors imports layout, which stands below it",
                                  {A: "from ..layout import find_heads"}),
    "a lazy import of a room below": (f"{new('ops')}:2: ops imports optim, which stands below it",
                                      {new("ops"): lazily("from ..optim import HeadAdamW")}),
    "a sibling, though listed": (f"{P}:1: patching must know nothing of scoring",
                                 {P: "from ..scoring import score_heads", face("patching"): also("scoring")}),
    "ops in selection, though listed": (
        "selection must know nothing of ops",
        {new("selection"): "from ..ops import METRICS", face("selection"): also("ops")}),
    "an arrow that is not listed": (f"weights imports selection, which the first line of {face('weights')}",
                                    {new("weights"): "from ..selection import HeadSelection"}),
    "a listed arrow that nothing needs": (f"{face('weights')}:1: lists selection, which no file of weights imports",
                                          {face("weights"): also("selection")}),
    "a listed arrow upwards": (f"{face('weights')}:1: lists cli, which does not stand above weights",
                               {face("weights"): also("cli")}),
    "a face that lists nothing": (f"{face('weights')}:1: the first line has to end in",
                                  {face("weights"): lambda text: text.replace("Imports: ", "Needs: ", 1)}),
    "a file behind a face": (f"{PAST}layout.planted.x past", {P: "from ..layout.planted import x"}),
    "the same, absolute": (f"{PAST}layout.planted.x past", {P: "from alps_kernels.layout.planted import x"}),
    "the same, by its path": (f"{PAST}layout.planted past", {P: "import alps_kernels.layout.planted"}),
    "the same, the file itself": (f"{PAST}layout.planted past", {P: "from ..layout import planted"}),
    "the same, lazily": (f"{P}:2: imports alps_kernels.layout.planted.x past",
                         {P: lazily("from ..layout.planted import x")}),
    "the same, for types": (f"{P}:4: imports alps_kernels.layout.planted.x past",
                            {P: for_types("from ..layout.planted import x")}),
    "the same, by import_module": (f"{P}:2: imports alps_kernels.layout.planted past",
                                   {P: lazily("importlib.import_module('alps_kernels.layout.planted')")}),
    "the same, by import_module, relative": (f"{P}:2: imports alps_kernels.layout.planted past",
                                             {P: lazily("import_module('..layout.planted', __package__)")}),
    "a part of ops": (f"{PAST}ops.adamw.head_adamw_ past the face of ops", {P: "from ..ops.adamw import head_adamw_"}),
    "a name that is not exported": (f"{PAST}layout.sum_of_nothing past", {P: "from ..layout import sum_of_nothing"}),
    "every name of a face": (f"{PAST}layout.* past", {P: "from ..layout import *"}),
    "a whole room": (f"{PAST}layout past", {P: "from .. import layout"}),
    "the package's own face": (f"{PAST}find_heads: take the name", {P: "from .. import find_heads"}),
    "a public name of a file": (
        "alps_kernels.optim.state.HeadAdamW past the face of optim",
        {"alps_kernels/__init__.py": lambda text: text.replace('"HeadAdamW": "optim"', '"HeadAdamW": "optim.state"')}),
    "a face that exports a file": ("a face exports names, not files",
                                   {face("layout"): lambda text: text + "from . import planted\n"}),
    "a file that is gone": (f"{A}:2: imports alps_kernels.tensors.gone, which does not exist",
                            {A: lazily("from .gone import x")}),
    "an import above the top": (f"{P}:2: imports ...bench.common, above the top",
                                {P: lazily("from ...bench.common import x")}),
    "a circle of two files": (f"a circle of imports: {A} -> {B} -> {A}",
                              {A: "from .planted_b import y", B: lazily("from .planted import x")}),
    "a circle for types alone": (f"a circle of imports: {A} -> {B} -> {A}",
                                 {A: "from .planted_b import y", B: for_types("from .planted import x")}),
    "a circle through a face": (f"a circle of imports: {face('tensors')} -> {A} -> {face('tensors')}",
                                {A: lazily("from . import Ranges"),
                                 face("tensors"): lambda text: text + "from .planted import f\n"}),
    "301 lines": (f"{A}:301: 301 lines, 300 at most", {A: "x = 1\n" * 301}),
    "301 lines of device code": (f"{DEVICE}:301: 301 lines", {DEVICE: "x = 1\n" * 301}),
    "a folder that is no room": ("utils is not a room", {face("utils"): '"""Things. Imports: nothing."""'}),
    "a file beside the rooms": ("kernels/planted.py:1: planted is not a room", {"alps_kernels/planted.py": "x = 1"}),
    "triton outside ops": (f"{new('optim')}:2: imports triton, which optim may not",
                           {new("optim"): lazily("import triton")}),
    "triton when ops is imported": (f"{new('ops')}:1: imports triton when it is itself imported",
                                    {new("ops"): "import triton"}),
    "device code outside ops": (f"{P}:2: patching must know nothing of csrc_triton", {P: lazily("import csrc_triton")}),
    "torch in device code": (f"{DEVICE}:1: imports torch, which csrc_triton may not", {DEVICE: "import torch"}),
    "a room in device code": ("csrc_triton must know nothing of tensors",
                              {DEVICE: "from alps_kernels.tensors import Ranges"}),
    "transformers when layout is imported": (
        f"{new('layout')}:2: imports transformers when it is itself imported",
        {new("layout"): "try:\n    import transformers\nexcept ImportError:\n    pass\n"}),
    "a module whose name is computed": (f"{A}:1: imports a module by a name that is computed",
                                        {A: "f = [importlib.import_module(name) for name in 'ab']"}),
    "an import of a room below, for types": (f"{new('ops')}:4: ops imports optim, which stands below it",
                                             {new("ops"): for_types("from ..optim import HeadAdamW")}),
    "an import of a room below, in a class": (f"{new('ops')}:2: ops imports optim, which stands below it",
                                              {new("ops"): "class C:\n    from ..optim import HeadAdamW\n"}),
    "a file behind the face of a part of ops": (
        "past the face of ops.adamw", {"alps_kernels/ops/delta/planted.py": "from ..adamw.rounding import split"}),
    "a circle of three files": (f"a circle of imports: {A} -> {B} -> {C} -> {A}",
                                {A: "from .planted_b import y", B: "from .planted_c import z",
                                 C: lazily("from .planted import x")}),
    "a folder without a face": ("a folder without a face", {"alps_kernels/optim/part/planted.py": "x = 1"}),
    "a room in the file of the version": ("alps_kernels.version imports",
                                          {"alps_kernels/version.py": lambda text: text + "from .tensors import Ranges\n"}),
    "import_module by another name": (f"{A}:1: imports a module by a name that is computed",
                                      {A: "from importlib import import_module as load"}),
}


def test_the_package_keeps_every_rule():
    assert not violations(ROOT), "\n".join(violations(ROOT))


@pytest.mark.parametrize("fault", PLANTED)
def test_a_rule_that_is_broken_is_reported(fault, tmp_path):
    for top in ("alps_kernels", "csrc_triton"):
        shutil.copytree(ROOT / top, tmp_path / top, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / new("layout")).write_text("x = 1\n")  # allowed as it is
    before, (expected, files) = set(violations(tmp_path)), PLANTED[fault]
    assert before == set(violations(ROOT))
    for file, text in files.items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text if isinstance(text, str) else text(path.read_text()))
    found = sorted(set(violations(tmp_path)) - before)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("folder", ["bench", "examples"])
def test_users_of_the_package_import_from_faces(folder):
    house = House(ROOT)
    for path in sorted((ROOT / folder).rglob("*.py")):
        for found in imports(path.read_text(), folder):
            room = house.room(house.target(found))
            if room and room != "demo":  # its files are used as they are
                assert found.module == house.faces[room] and found.name in exported(house.text[found.module]), \
                    f"{path.relative_to(ROOT)}:{found.line} imports {found.module}.{found.name}"
