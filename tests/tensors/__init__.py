"""Tests of alps_kernels/tensors/; files are in tests/reliability/test_saving.py, DTensors in tests/optim/test_sharded.py."""
