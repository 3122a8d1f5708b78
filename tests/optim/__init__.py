"""Tests of alps_kernels/optim/, and of rounding, 8-bit moments and launches through the optimizer."""
