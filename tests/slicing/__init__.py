"""Tests of alps_kernels/slicing/."""
