"""Kernels compiled for GPUs without a GPU: registers, spills, wide loads."""
