"""Triton's first launch without a C compiler or Python.h, through Triton's own build; other errors stay themselves."""

import shutil
import subprocess
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from alps_kernels.ops import Segment, head_delta, head_delta_projection
from alps_kernels.ops.delta import projection, tables
from alps_kernels.ops.launching import launching

build = pytest.importorskip("triton.runtime.build")
MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "alps_probe"};
PyMODINIT_FUNC PyInit_alps_probe(void) { return PyModule_Create(&module); }
"""
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="the machine has no gcc")


@pytest.fixture(autouse=True)
def a_new_machine(tmp_path, monkeypatch):
    """An empty cache of Triton's, and no compiler found before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield
    forget()


def forget():
    if hasattr(build, "_find_compiler"):  # Triton 3.9 keeps what it found
        build._find_compiler.cache_clear()


def compile_c(source=MODULE):
    return build.compile_module_from_src(source, "alps_probe")


def without_compilers(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    forget()


def without_headers(monkeypatch, tmp_path):
    (tmp_path / "include").mkdir()
    shipped = sysconfig.get_paths
    monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **kw: {**shipped(*args, **kw),
                                                                     "include": str(tmp_path / "include")})


def test_no_compiler(monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match="no C compiler .neither gcc nor clang is on PATH.*apt-get install gcc"
                                           ".*dnf install.*conda install") as caught, launching():
        compile_c()
    assert "Failed to find C compiler" in str(caught.value.__cause__) and "Python.h" not in str(caught.value)


def test_cc_names_no_program(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="the C compiler that CC names, 'no-such-compiler', cannot be run") as caught:
        with launching():
            compile_c()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@needs_gcc
def test_no_headers(monkeypatch, tmp_path):
    without_headers(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match=r"include/Python\.h does not exist\. .*python3-dev") as caught, launching():
        compile_c()
    assert isinstance(caught.value.__cause__, subprocess.CalledProcessError)
    assert "C compiler that" not in str(caught.value) and "no C compiler" not in str(caught.value)


def test_both_are_named_at_once(monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    without_headers(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match=r"there is no C compiler .* and .*include/Python\.h does not exist"):
        with launching():
            compile_c()


@needs_gcc
def test_what_is_cached_needs_no_compiler(monkeypatch, tmp_path):
    compile_c()
    without_compilers(monkeypatch, tmp_path)
    with launching():
        compile_c()


@needs_gcc
def test_an_error_in_the_c_code_stays_itself():
    with pytest.raises(subprocess.CalledProcessError), launching():
        compile_c("#include <Python.h>\nnot C")


@pytest.mark.parametrize("error", [
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), OSError("out of space"),
    FileNotFoundError(2, "No such file or directory", "table.bin"), ValueError("a shape"),
    subprocess.CalledProcessError(1, ["ldconfig", "-p"]), subprocess.CalledProcessError(1, "ptxas"),
], ids=repr)
def test_other_errors_stay_themselves_without_a_compiler_and_headers(error, monkeypatch, tmp_path):
    without_compilers(monkeypatch, tmp_path)
    without_headers(monkeypatch, tmp_path)
    with pytest.raises(type(error)) as caught, launching():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("op, module, kernels, n", [
    (head_delta, "head_delta", "head_delta", 1), (head_delta_projection, "head_projection", "projection", 3),
])
def test_scoring_says_so(op, module, kernels, n, monkeypatch, tmp_path):
    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: compile_c()

    names = ("group_products_kernel", *(f"{kernels}_{which}_kernel" for which in ("stats", "scan")))
    loaded, kernel = [], {name: Kernel() for name in names}
    for host in (tables, projection):
        monkeypatch.setattr(host, "device_code", lambda name: loaded.append(name) or SimpleNamespace(**kernel))
    without_compilers(monkeypatch, tmp_path)
    weights = torch.ones(2, 4, 16)
    with pytest.raises(RuntimeError, match="Triton cannot start a kernel"):
        op([[Segment(weights, weights, (0, 1))] * n], ["pad"], backend="triton")
    assert loaded == [module]
