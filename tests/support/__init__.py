"""Helpers of several test folders: planted faults, ranks, real models, the interpreter."""
