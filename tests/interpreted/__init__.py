"""Kernels under Triton's interpreter, in a process of their own; also what the emulator runs."""
