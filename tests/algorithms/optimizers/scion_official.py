"""A slow NumPy float64 port of the official Scion, the oracle of test_scion.py.

Source: scion.py of github.com/LIONS-EPFL/scion at commit f58a393: `Scion.step` and the `lmo` of its
norms, without bfloat16. All of W [out, in], but for embeddings, [tokens, out], as torch keeps them.
"""

import math

import numpy as np

from tests.algorithms.polar_official import newton_schulz


def scion(w, gradient, steps, *, lmo, lr, momentum, scale, unconstrained):
    """W after each step."""
    average, found = np.zeros_like(w), []
    for step in range(steps):
        g = gradient(w, step)
        if momentum != 1:
            average = (1 - momentum) * average + momentum * g
            g = average
        w = (w if unconstrained else w * (1 - lr)) - lr * scale * lmo(g)
        found.append(w)
    return found


def spectral(g):
    return newton_schulz(g) * math.sqrt(g.shape[0] / g.shape[1])


def sign(g):
    return np.sign(g) / g.shape[1]


def col_norm(g):
    return g / (np.linalg.norm(g, axis=0, keepdims=True) / math.sqrt(g.shape[0]) + 1e-8)


def col_norm_of_embeddings(g):
    return col_norm(g.T).T


def row_norm(g):
    return g / (np.linalg.norm(g, axis=1, keepdims=True) * math.sqrt(g.shape[1]) + 1e-8)


def bias_rms(g):
    return g / (np.sqrt((g**2).mean()) + 1e-8)
