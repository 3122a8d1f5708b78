"""Plant a fault in the package's own code, so that a named check must turn red."""

import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch


def edit(source: str, *edits: tuple[str, str]) -> str:
    """`source` with each (old, new) made; an edit whose place is not found exactly once is an error."""
    for old, new in edits:
        if source.count(old) != 1:
            raise LookupError(f"the place of a fault is there {source.count(old)} times: {old!r}")
        source = source.replace(old, new)
    return source


def plant(monkeypatch, module: ModuleType, *edits: tuple[str, str]) -> None:
    """Give the functions of `module` the code they would have with these edits.

    Their code is swapped in place, so that whoever imported them runs the fault too.
    """
    namespace = {"__name__": module.__name__, "__package__": module.__package__, "__file__": module.__file__}
    exec(compile(edit(inspect.getsource(module), *edits), module.__file__, "exec"), namespace)
    whole, altered, changed = _functions(vars(module)), _functions(namespace), 0
    for name, function in whole.items():
        if _body(function.__code__) != _body(altered[name].__code__):
            monkeypatch.setattr(function, "__code__", altered[name].__code__)
            changed += 1
    if not changed:
        raise LookupError(f"no function of {module.__name__} changed")


def check_plantable(module: ModuleType, *edits: tuple[str, str]) -> None:
    """Raises LookupError where `plant` would: ranks report every error, so theirs would count as a fault that is seen."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, module, *edits)


def _body(code):
    return code.co_code, code.co_names, code.co_varnames, [
        _body(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]


def _functions(namespace: dict) -> dict[str, FunctionType]:
    """Functions and methods defined in a module, by qualified name, without their decorators."""
    found = {}
    for value in list(namespace.values()):
        members = vars(value).values() if isinstance(value, type) and value.__module__ == namespace["__name__"] else [value]
        for member in members:
            for wrapped in (functools.cached_property, property, classmethod, staticmethod):
                if isinstance(member, wrapped):
                    member = getattr(member, "func", None) or getattr(member, "fget", None) or member.__func__
            member = inspect.unwrap(member) if callable(member) and not isinstance(member, torch.Tensor) else member
            if isinstance(member, FunctionType) and member.__module__ == namespace["__name__"]:
                found[member.__qualname__] = member
    return found


def plant_kernel(monkeypatch, folder, file: str, *edits: tuple[str, str]) -> None:
    """Let ops launch a copy of csrc_triton in `folder` in which `file` has these edits (interpreter)."""
    import csrc_triton
    from alps_kernels.ops.adamw import plan as head_adamw
    from alps_kernels.ops.delta import projection, tables as delta_tables

    name = "faulty_" + folder.name.replace("-", "_").replace(".", "_")
    package = folder / name
    package.mkdir()
    for source in Path(csrc_triton.__path__[0]).glob("*.py"):
        text = source.read_text()
        (package / source.name).write_text(edit(text, *edits) if source.name == file else text)
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py", submodule_search_locations=[str(package)])
    root = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, root)
    spec.loader.exec_module(root)
    for launcher in (head_adamw, delta_tables, projection):
        monkeypatch.setattr(launcher, "device_code", lambda leaf: importlib.import_module(f"{name}.{leaf}"))
