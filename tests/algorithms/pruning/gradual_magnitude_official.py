"""A slow NumPy port of gradual magnitude pruning, the oracle of test_gradual_magnitude.py.

Source: github.com/tensorflow/model-optimization, `PolynomialDecay` in
python/core/sparsity/keras/pruning_schedule.py at commit 0578604 and `Pruning._update_mask` in
pruning_impl.py at commit 05d87a3. There, gradients reach pruned weights; here, as the paper says,
they do not.
"""

import numpy as np


def should_prune(step, begin, end, frequency):
    return begin <= step <= end and (step - begin) % frequency == 0


def sparsity_at(step, initial, final, begin, end):
    p = np.float32(min(1.0, max(0.0, (step - begin) / (end - begin))))
    return np.float32(initial - final) * (np.float32(1) - p) ** 3 + np.float32(final)


def mask(w, sparsity):
    k = int(max(np.round(np.float32(w.size) * (1 - sparsity)), 1))
    threshold = np.sort(np.abs(w).reshape(-1))[::-1][k - 1]
    return (np.abs(w) >= threshold).astype(w.dtype)


def train(w, gradient, *, steps, initial, final, begin, end, frequency, lr, momentum):
    """(weights, mask) after each step; gradient(w, step) is of the masked weights."""
    alive, accumulated = np.ones_like(w), np.zeros_like(w)
    for step in range(steps):
        accumulated = momentum * accumulated + alive * gradient(w, step)
        w = alive * (w - lr * accumulated)
        if should_prune(step + 1, begin, end, frequency):
            alive = mask(w, sparsity_at(step + 1, initial, final, begin, end))
            w = alive * w
        yield w, alive
