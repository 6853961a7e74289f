"""Slow port of fmfi-compbio/admm-pruning at 8039208 (MIT), lib/admm.py: `AdmmPruner.fasterprune`.

`topk` is of the fraction that grows: the official code computes that fraction, and then takes the
last one in every step where the mask is of a whole layer (its other two branches do not).
"""

import numpy as np


def admm(w, h, *, sparsity=0.5, prune_n=0, percdamp=0.1, iterative_prune=15, iters=20):
    """prune_n: 2 for 2:4, the one pattern whose masks the official code has."""
    norm = np.sqrt(np.diag(h)) + 1e-8
    xx = h / norm
    xx = (xx.T / norm).T
    w = (w * norm).T
    xx[np.diag_indices_from(xx)] += percdamp * np.diag(xx).mean()
    if iterative_prune == 0:
        mask = two_of_four(w) if prune_n else smallest_gone(np.abs(w), sparsity)
    rho = 1
    xy = xx @ w
    inverse = np.linalg.inv(xx + rho * np.eye(len(xx)))
    u = np.zeros_like(w)
    for t in range(iters):
        if iterative_prune > 0 and t < iterative_prune:
            current = sparsity - sparsity * (1 - (t + 1) / iterative_prune) ** 3
            size = np.abs(w + u)
            if prune_n:
                size = np.where(two_of_four(w + u), np.inf, size)
            mask = smallest_gone(size, current)
        z = (w + u) * mask
        u = u + (w - z)
        w = inverse @ (xy + rho * (z - u))
    return ((w + u) * mask).T / norm


def smallest_gone(size, sparsity):
    mask = np.ones(size.size, bool)
    mask[np.argsort(size.flatten(), kind="stable")[: int(size.size * sparsity)]] = False
    return mask.reshape(size.shape)


def two_of_four(w):
    size = np.abs(w.T.reshape(-1, 4))
    mask = np.zeros_like(size, bool)
    np.put_along_axis(mask, np.argsort(size, 1)[:, 2:], True, 1)
    return mask.reshape(w.T.shape).T
