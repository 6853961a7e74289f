"""A slow NumPy port of Ghorbani et al.'s Lanczos iteration and density.

Source: `lanczos_alg` in jax/lanczos.py, `tridiag_to_density` in jax/density.py of
github.com/google/spectral-density at commit 5814547 (Apache-2.0).
"""

import numpy as np


def lanczos(a, start, order):
    """The tridiagonal matrix; their start is drawn inside."""
    t, vectors = np.zeros((order, order)), [start / np.linalg.norm(start)]
    beta = 0.0
    for i in range(order):
        w = a @ vectors[i] - (beta * vectors[i - 1] if i else 0)
        t[i, i] = w @ vectors[i]
        w = w - t[i, i] * vectors[i]
        for earlier in vectors[:i]:
            w = w - (w @ earlier) * earlier
        beta = np.linalg.norm(w)
        if i + 1 < order:
            t[i, i + 1] = t[i + 1, i] = beta
            vectors.append(w / beta)
    return t


def density(tridiagonals, sigma_squared, grid_len):
    """The density on their grid, and the grid; the variance is in units of its width."""
    decomposed = [np.linalg.eigh(t) for t in tridiagonals]
    low = np.mean([values.min() for values, _ in decomposed]) - 1e-2
    high = np.mean([values.max() for values, _ in decomposed]) + 1e-2
    grid = np.linspace(low, high, grid_len)
    variance = sigma_squared * max(1, high - low)
    total = np.zeros(grid_len)
    for values, vectors in decomposed:
        for value, weight in zip(values, vectors[0] ** 2, strict=True):
            bell = np.exp(-((grid - value) ** 2) / (2 * variance))
            total += weight * bell / np.sqrt(2 * np.pi * variance) / len(decomposed)
    return total / (total.sum() * (grid[1] - grid[0])), grid, variance
