"""Tests of alps_kernels/integrations/."""
