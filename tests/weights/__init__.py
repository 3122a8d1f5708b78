"""Tests of alps_kernels/weights/."""
