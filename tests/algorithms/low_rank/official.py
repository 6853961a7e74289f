"""Slow NumPy float64 ports of three official codes: LQER, EoRA and SVDQuant.

LQER: github.com/ChengZhang-98/lqer at commit 88b6960, `WeightApproximatorLqerAct` in
src/lqer/approximate/lqer_act.py and `ScaleHookFactoryMeanAbs` in
src/lqer/statistic_profiler/scale.py (no licence file). Left out: quantized factors.

EoRA: github.com/NVlabs/EoRA at commit 11ff6c0, `llama_sequential_eigen` in EoRA/eora.py (NVIDIA
Source Code License for DoRA, non-commercial). Left out: casts to the weight's dtype.

SVDQuant: github.com/mit-han-lab/deepcompressor at commit 69f3473, `LowRankBranch` in
deepcompressor/nn/patch/lowrank.py and `QuantLowRankCalibrator` in deepcompressor/calib/lowrank.py
(Apache-2.0), the first of its iterations, with compensate=false.

Only equations and constants were taken, none of the code. Weights are [o, i]; batches are a list of
[n, i].
"""

import numpy as np


def lqer_scale(batches: list[np.ndarray]) -> np.ndarray:
    """The largest batch mean of |x_j|, at least 1e-4, over the geometric mean of its extremes."""
    scale = np.max([np.abs(x).mean(0) for x in batches], 0)
    scale = np.maximum(scale, 1e-4)
    return scale / np.sqrt(scale.min() * scale.max())


def lqer(e: np.ndarray, scale: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A [i, r] and B [r, o] with E ≈ (A B)ᵀ: there, all is transposed."""
    u, s, vt = np.linalg.svd(np.diag(scale) @ e.T)
    return np.linalg.inv(np.diag(scale)) @ u[:, :rank], np.diag(s[:rank]) @ vt[:rank]


def eora_moment(batches: list[np.ndarray]) -> np.ndarray:
    """A running mean of X Xᵀ over single windows; its weights are not equal, as there."""
    count, moment = len(batches), np.zeros((batches[0].shape[1],) * 2)
    for x in batches:
        moment = moment * (count / (count + 1)) + x.T @ x / count
    return moment


def eora(e: np.ndarray, moment: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B [o, r] and A [r, i] with E ≈ B A."""
    values, q = np.linalg.eigh(moment)
    if (values < 0).any():
        values = np.where(values < 0, values[values > 0].min(), values)
    roots = np.sqrt(values)
    u, s, vt = np.linalg.svd(e @ (q * roots), full_matrices=False)
    half = np.sqrt(s[:rank])
    return u[:, :rank] * half, half[:, None] * (vt[:rank] @ ((1 / roots)[:, None] * q.T))


def branch(w: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """SVDQuant's branch: b [o, r], which holds the singular values, and a [r, i]."""
    u, s, vh = np.linalg.svd(w)
    return u[:, :rank] * s[:rank], vh[:rank]
