"""Distances between the heads of two models: op, tables, CPU backend, oracle. Imports: csrc_triton."""

from .op import METRICS, Segment, head_delta, head_delta_projection

__all__ = ["METRICS", "Segment", "head_delta", "head_delta_projection"]
