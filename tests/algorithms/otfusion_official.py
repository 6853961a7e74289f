"""A slow NumPy port of how OT fusion aligns the weights of networks.

Source: `get_wassersteinized_layers_modularized` in wasserstein_ensemble.py of
github.com/sidak/otfusion at commit 8144c3b (which states no licence), with --correction,
--proper-marginals, --past-correction and --skip-last-layer, equal masses and squared distances.
Its exact plans are by linear programming: of equal masses, an assignment.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment


def plan(cost, epsilon):
    """A transport plan of masses 1 / n and 1 / m; exact where epsilon is None."""
    n, m = cost.shape
    if epsilon is None:
        found = np.zeros((n, m))
        found[linear_sum_assignment(cost)] = 1 / n
        return found
    kernel, v = np.exp(-cost / epsilon), np.ones(m)
    for _ in range(5000):
        u = 1 / n / (kernel @ v)
        v = 1 / m / (kernel.T @ u)
    return u[:, None] * kernel * v


def aligned(first, second, epsilon=None):
    """The first network's weights in the order of the second's neurons; epsilon in units of the
    mean cost.
    """
    found, t = [], None
    for number, (w0, w1) in enumerate(zip(first, second, strict=True)):
        w0 = w0 if t is None else w0 @ t
        if number == len(first) - 1:
            return [*found, w0]
        cost = ((w0[:, None] - w1[None]) ** 2).sum(-1)
        t = plan(cost, None if epsilon is None else epsilon * cost.mean())
        t = t / t.sum(0)
        found.append(t.T @ w0)
    raise AssertionError
