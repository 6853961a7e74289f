"""Slow ports of IST-DASLab/sparsegpt (sparsegpt.py, `SparseGPT.fasterprune`, and quant.py) and of
locuslab/wanda (lib/prune.py), in numpy.
"""

import numpy as np


def quantize(x, scale, zero, maxq):
    q = np.clip(np.round(x / scale) + zero, 0, maxq)
    return scale * (q - zero)


def sparsegpt(w, h, *, sparsity, prunen=0, prunem=0, blocksize=128, percdamp=0.01, grid=None):
    """grid: scale [o], zero [o] and the largest code, or None for no quantizer."""
    w, h = w.copy(), h.copy()
    rows, columns = w.shape
    dead = np.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    damp = percdamp * np.mean(np.diag(h))
    h[np.arange(columns), np.arange(columns)] += damp
    hinv = np.linalg.cholesky(np.linalg.inv(h)).T  # upper
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        count = i2 - i1
        w1, q1, err1 = w[:, i1:i2].copy(), np.zeros((rows, count)), np.zeros((rows, count))
        hinv1 = hinv[i1:i2, i1:i2]
        if prunen == 0:
            tmp = w1**2 / np.diag(hinv1).reshape(1, -1) ** 2
            thresh = np.sort(tmp.flatten())[int(tmp.size * sparsity)]
            mask1 = tmp <= thresh
        else:
            mask1 = np.zeros_like(w1) == 1
        for i in range(count):
            column, d = w1[:, i], hinv1[i, i]
            if prunen != 0 and i % prunem == 0:
                tmp = (
                    w1[:, i : i + prunem] ** 2 / np.diag(hinv1)[i : i + prunem].reshape(1, -1) ** 2
                )
                chosen = np.argsort(tmp, axis=1, kind="stable")[:, :prunen]
                np.put_along_axis(mask1, i + chosen, True, 1)
            q = column.copy()
            q[mask1[:, i]] = 0
            if grid is not None:
                q = quantize(q, *grid)
            q1[:, i] = q
            err = (column - q) / d
            w1[:, i:] -= np.outer(err, hinv1[i, i:])
            err1[:, i] = err
        w[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return w


def wanda(w, squares, *, sparsity, prune_n=0, prune_m=0):
    metric = np.abs(w) * np.sqrt(squares.reshape(1, -1))
    mask = np.zeros_like(metric) == 1
    if prune_n != 0:
        for ii in range(metric.shape[1]):
            if ii % prune_m == 0:
                tmp = metric[:, ii : ii + prune_m]
                chosen = np.argsort(tmp, axis=1, kind="stable")[:, :prune_n]
                np.put_along_axis(mask, ii + chosen, True, 1)
    else:
        order = np.argsort(metric, axis=-1, kind="stable")
        np.put_along_axis(mask, order[:, : int(metric.shape[1] * sparsity)], True, 1)
    return np.where(mask, 0, w)


def magnitude(w, *, sparsity):
    size = np.abs(w)
    thresh = np.sort(size.flatten())[int(w.size * sparsity)]
    return np.where(size <= thresh, 0, w)
