"""Faults provoked on purpose: kills, full disks, bad input, moved bytes (the guard), interrupted edits."""
