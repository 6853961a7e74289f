"""A slow NumPy float64 port of the official GPTAQ code, the oracle of test_gptaq.py.

Source: github.com/Intelligent-Computing-Lab-Yale/GPTAQ at commit 883afc6, `GPTAQ.fasterquant` in
fake_quant/gptaq_utils.py (no licence is stated), one scale per row, columns in their own order. Its
blocks of lazy updates are left out: the result does not depend on them.
"""

import numpy as np

from tests.algorithms.quantization.gptq_official import find_params


def gptaq(
    w: np.ndarray,
    x: np.ndarray,
    original: np.ndarray,
    *,
    bits: int,
    sym: bool = False,
    percdamp: float = 0.01,
    alpha: float = 0.25,
) -> np.ndarray:
    """Ŵ [o, i] for W, given what the layer reads, x [n, i], and what it reads in the original."""
    h, cross = x.T @ x, (original - x).T @ x
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w = np.where(dead, 0.0, w)
    cross[:, dead] = 0
    grid = find_params(w, bits, sym)
    h += percdamp * np.diag(h).mean() * np.eye(len(h))
    u = np.linalg.cholesky(np.linalg.inv(h)).T  # upper: Uᵀ U = H⁻¹
    p = alpha * np.triu(cross @ u.T, 1) @ u
    q = np.zeros_like(w)
    for j in range(w.shape[1]):
        now = w[:, j].copy()
        q[:, j] = grid.dequantize(grid.quantize(now[:, None]))[:, 0]
        error = (now - q[:, j]) / u[j, j]
        w[:, j:] -= np.outer(error, u[j, j:]) - np.outer(now, p[j, j:])
    return q
