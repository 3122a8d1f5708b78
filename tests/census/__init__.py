"""Every model type of transformers: located heads against an independent oracle."""
