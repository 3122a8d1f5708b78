"""Tests of alps_kernels/patching/ and of `alps patch`."""
