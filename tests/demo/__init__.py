"""Tests of alps_kernels/demo/."""
