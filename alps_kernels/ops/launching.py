"""Explain a first launch that fails because Triton cannot compile C here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def launching() -> Iterator[None]:
    """Wrap the first launch of a kernel: name the C compiler or header that Triton did not find.

    Triton compiles the code that starts a kernel with a C compiler and Python's headers, and keeps
    it in its cache. So nothing is looked for unless a launch failed.

    Raises:
        RuntimeError: a compiler or Python.h is missing. Every other error passes through.
    """
    try:
        yield
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        if not (_is_of_build(error) and (missing := _missing())):
            raise
        raise RuntimeError(
            f"Triton cannot start a kernel: it compiles C code for that, and {' and '.join(missing)}. Install what is"
            " missing: `apt-get install gcc libc6-dev python3-dev` (Debian, Ubuntu), `dnf install gcc python3-devel`"
            " (RHEL, Fedora), `conda install -c conda-forge c-compiler` (conda, whose Python has its headers); the"
            " headers must be those of the Python that runs") from error


def _is_of_build(error: Exception) -> bool:
    """The error is from Triton's call of a C compiler (`_build` in triton/runtime/build.py of 3.6 and 3.9)."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"-I{_headers()}" in error.cmd
    if isinstance(error, OSError):
        return error.filename is not None and error.filename == os.environ.get("CC")
    return "Failed to find C compiler" in str(error)


def _missing() -> list[str]:
    cc, header = os.environ.get("CC"), _headers() / "Python.h"
    missing = []
    if not any(map(shutil.which, ("gcc", "clang") if cc is None else (cc,))):
        missing.append("there is no C compiler (neither gcc nor clang is on PATH, and CC is not set)" if cc is None
                       else f"the C compiler that CC names, {cc!r}, cannot be run")
    if not header.is_file():
        missing.append(f"{header} does not exist")
    return missing


def _headers() -> Path:
    """Where Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme()  # Debian's posix_local names a folder without headers
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))
