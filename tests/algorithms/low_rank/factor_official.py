"""Slow NumPy float64 ports of the official codes of SVD-LLM and ASVD.

SVD-LLM: github.com/AIoT-MLSys-Lab/SVD-LLM at commit 1009a99 (Apache-2.0), `whitening` and
`local_update` in SVDLLM.py. Left out: casts to the weight's dtype.

ASVD: github.com/hahnyuan/ASVD4LLM at commit 8630427 (MIT), `calib_input_distribution` with abs_mean
in act_aware_utils.py and `SVDLinear.from_linear` in modules/svd_linear.py, with an exact singular
value decomposition in the place of a randomized one.

Only equations and constants were taken, none of the code. Weights are [o, i], activations [n, i].
"""

import numpy as np


def whitening_matrix(x: np.ndarray) -> np.ndarray:
    """S, lower triangular with S Sᵀ = X Xᵀ, whose eigenvalues are raised where it is singular."""
    moment = x.T @ x
    try:
        return np.linalg.cholesky(moment)
    except np.linalg.LinAlgError:
        least = np.linalg.eigvalsh(moment)[0]
        return np.linalg.cholesky(moment + (1e-6 - least) * np.eye(len(moment)))


def rank(shape: tuple[int, int], ratio: float) -> int:
    o, i = shape
    return int(o * i * ratio / (o + i))


def svd_llm(w: np.ndarray, x: np.ndarray, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """U [o, r] and V [r, i], after whitening alone."""
    s = whitening_matrix(x)
    u, values, vt = np.linalg.svd(w @ s, full_matrices=False)
    k = rank(w.shape, ratio)
    half = np.diag(np.sqrt(values[:k]))
    return u[:, :k] @ half, half @ (vt[:k] @ np.linalg.inv(s))


def svd_llm_updated(
    w: np.ndarray, x: np.ndarray, ratio: float, s: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """With U fitted to the outputs of all windows at once; s: None leaves out whitening."""
    u, values, vt = np.linalg.svd(w if s is None else w @ s, full_matrices=False)
    k = rank(w.shape, ratio)
    v = vt[:k] if s is None else vt[:k] @ np.linalg.inv(s)
    sigma = np.diag(values[:k])
    fitted = np.linalg.lstsq(x @ v.T @ sigma, x @ w.T, rcond=None)[0]
    half = np.diag(np.sqrt(values[:k]))
    return fitted.T @ half, half @ v  # as there: Σ once, in the halves, of U' Σ V


def asvd(
    w: np.ndarray, batches: list[np.ndarray], ratio: float, alpha: float, align: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """A [o, r] and B [r, i], the singular values in both."""
    scale = np.sum([np.abs(x).mean(0) for x in batches], 0) ** alpha + 1e-6
    o, i = w.shape
    k = int(np.ceil(int(o * i * ratio) // (o + i) / align) * align)
    u, s, vt = np.linalg.svd(w * scale, full_matrices=False)
    half = np.sqrt(s[:k])
    return u[:, :k] * half, half[:, None] * (vt[:k] / scale)
