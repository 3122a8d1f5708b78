"""Tests of alps_kernels/selection/; the guard is in tests/reliability, shards in tests/optim/test_sharded.py."""
