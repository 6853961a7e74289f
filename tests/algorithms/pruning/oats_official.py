"""A slow NumPy float64 port of the official code of OATS.

github.com/stephenqz/OATS at commit 776d36a (no licence file): `altern_ls` in OATS/prune_oats.py,
and the shares that `prune_oats` gives it. Only equations and constants were taken, none of the
code. Weights are [o, i].
"""

import numpy as np


def oats(
    w: np.ndarray,
    squares: np.ndarray,
    *,
    sparsity: float = 0.5,
    rank_ratio: float,
    iterations: int,
    prune_n: int = 0,
    prune_m: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The sparse matrix and the one of low rank; squares: the mean x_j², up to a factor.

    Of each prune_m entries prune_n stay, if they are not 0.
    """
    (o, i), allowed = w.shape, 1 - sparsity
    gone = 1.0 - (1.0 - rank_ratio) * allowed
    if prune_n:
        allowed = prune_n / prune_m / (1.0 - rank_ratio)
    rank = int(rank_ratio * allowed * (o * i) / (o + i))
    d = np.sqrt(squares)
    scaled, sparse = w * d, np.zeros_like(w)
    for _ in range(iterations):
        u, s, vt = np.linalg.svd(scaled - sparse, full_matrices=False)
        s[rank:] = 0
        low = u @ np.diag(s) @ vt
        sparse = scaled - low
        for row in sparse:
            if prune_n:
                for start in range(0, i, prune_m):
                    part = row[start : start + prune_m]
                    part[np.argsort(np.abs(part), kind="stable")[: prune_m - prune_n]] = 0
            else:
                row[np.argsort(np.abs(row), kind="stable")[: int(i * gone)]] = 0
    return sparse / d, low / d
