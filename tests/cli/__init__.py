"""Tests of alps_kernels/cli/; `alps patch` is in tests/patching/test_checkpoints.py."""
