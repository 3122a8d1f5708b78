"""The structure: rooms, faces, arrows, file sizes, import cost."""
