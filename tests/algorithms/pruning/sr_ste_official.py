"""A slow NumPy port of the official SR-STE, the oracle of test_n_m.py.

Source: github.com/NM-sparsity/NM-sparsity at commit 3cebd6b, `Sparse` in
devkit/sparse_ops/sparse_ops.py, on W [o, i].
"""

import numpy as np


def mask(weight, n, m):
    groups = np.abs(weight).reshape(-1, m)
    index = np.argsort(groups, axis=1)[:, : m - n]
    kept = np.ones_like(groups)
    np.put_along_axis(kept, index, 0, axis=1)
    return kept.reshape(weight.shape)


def forward(weight, n, m):
    return weight * mask(weight, n, m)


def backward(weight, grad_output, n, m, decay):
    """The gradient that the optimizer sees of the loss's by the sparse weight."""
    return grad_output + decay * (1 - mask(weight, n, m)) * weight
