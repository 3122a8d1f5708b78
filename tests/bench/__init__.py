"""Tests of bench/: benchmarks, pages, the study."""
