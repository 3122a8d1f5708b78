"""Tests of alps_kernels/layout/; all model types are in tests/census."""
