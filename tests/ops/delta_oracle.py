"""Scores in extended precision (numpy long double), straight from their definitions."""

import numpy as np
import torch

METRICS = ("pad", "pad_index", "pad_values", "kl", "js", "cosine", "cosine_weights", "euclidean", "relative")


def _long(x):
    """A tensor of any dtype, or an array that is long double already."""
    return (x if isinstance(x, np.ndarray) else x.detach().double().numpy()).astype(np.longdouble)


def oracle(base, task, tau=1.0):
    """Every metric between two flat heads, as long doubles (64 bits of mantissa on x86)."""
    b, t = _long(base).ravel(), _long(task).ravel()
    p, q = np.exp((b - b.max()) / tau), np.exp((t - t.max()) / tau)
    p, q = p / p.sum(), q / q.sum()
    n, mean = len(p), (p + q) / 2
    steps = np.abs(np.cumsum(q - p)[:-1]).sum()
    distance = np.sqrt(((t - b) ** 2).sum())

    def cosine(x, y):
        return ((x / np.sqrt((x * x).sum()) - y / np.sqrt((y * y).sum())) ** 2).sum() / 2

    def divergence(x, y):
        return np.where(x > 0, x * np.log(np.where(x > 0, x / y, 1)) - x + y, y).sum()

    return {
        "pad": steps / max(n - 1, 1), "pad_index": steps, "pad_values": np.abs(np.sort(p) - np.sort(q)).mean(),
        "kl": divergence(q, p), "js": (divergence(p, mean) + divergence(q, mean)) / 2,
        "cosine": cosine(p, q), "cosine_weights": cosine(b, t),
        "euclidean": distance, "relative": distance / np.sqrt((b * b).sum()),
    }


def _stack(heads):
    return {name: torch.tensor([float(head[name]) for head in heads], dtype=torch.float64) for name in METRICS}


def stored_oracle(layers, tau=1.0):
    """What `head_delta` should return."""
    return _stack([
        oracle(*(torch.cat([getattr(s, side)[s.index[h]].double().flatten() for s in layer]) for side in ("base", "task")), tau)
        for layer in layers for h in range(len(layer[0].index))])


def projection_oracle(layers, tau=1.0):
    """What `head_delta_projection` should return; the products in long double too."""
    heads = []
    for q, k, v in layers:
        for h in range(len(q.index)):
            sides = []
            for side in ("base", "task"):
                a, b, c = (_long(getattr(s, side)[s.index[h]]) for s in (q, k, v))
                sides.append(a.T @ (b @ c.T))
            heads.append(oracle(*sides, tau))
    return _stack(heads)

