"""Tests in this folder run the kernels under Triton's interpreter, in a process of their own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("tests/interpreted needs its own process: TRITON_INTERPRET=1 pytest tests/interpreted", returncode=2)

from tests.support.interpreter import patch

patch()
