"""One function per kernel: check, choose a grid, launch. CPU tensors go to `reference`."""
