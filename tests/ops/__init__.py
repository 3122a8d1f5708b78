"""Tests of alps_kernels/ops/; kernels are in tests/interpreted, tests/compiled and tests/gpu."""
