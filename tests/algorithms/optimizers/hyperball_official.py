"""A slow NumPy float64 port of the authors' Hyperball, the oracle of test_hyperball.py.

Sources: github.com/marin-community/marin, lib/levanter/src/levanter/optim: `scale_by_adamh` of
adamh.py at commit 0084342, `scale_with_muonh` of muonh.py at commit 05422e2.
"""

import numpy as np

from tests.algorithms.polar_official import newton_schulz


def adamh(w, gradient, steps, *, lr, b1=0.9, b2=0.999, eps=1e-8):
    """W after each step."""
    first, second, found = np.zeros_like(w), np.zeros_like(w), []
    for step in range(1, steps + 1):
        g = gradient(w, step - 1)
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g**2
        u = (first / (1 - b1**step)) / (np.sqrt(second / (1 - b2**step)) + eps)
        w = scale_invariant_update(w, u, lr)
        found.append(w)
    return found


def muonh(w, gradient, steps, *, lr, momentum=0.95):
    """W after each step."""
    buffer, found = np.zeros_like(w), []
    for step in range(steps):
        g = gradient(w, step)
        buffer = momentum * buffer + g
        w = scale_invariant_update(w, newton_schulz(momentum * buffer + g, eps=1e-8), lr)
        found.append(w)
    return found


def scale_invariant_update(w, u, lr):
    norm = np.linalg.norm(w)
    moved = w - lr * u * norm / max(np.linalg.norm(u), 1e-10)
    return moved / np.linalg.norm(moved) * norm
