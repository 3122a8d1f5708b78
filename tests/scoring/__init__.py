"""Tests of alps_kernels/scoring/."""
