"""What universally slimmable training computes in one step, slowly, in NumPy.

Rewritten from what train.py (forward_loss, run_one_epoch) and utils/loss_ops.py of
github.com/JiahuiYu/slimmable_networks compute, at e470c2ceb4e97ec68eaddd30a41305f8eaf710d4 (CC
BY-NC 4.0): for a network of two layers whose hidden width is what slims.
"""

import numpy as np


def logits(x, weights, width):
    """weights: w1 [i, f], b1 [f], w2 [f, c], b2 [c]; the first `width` of the hidden units."""
    w1, b1, w2, b2 = weights
    return np.maximum(x @ w1[:, :width] + b1[:width], 0) @ w2[:width] + b2


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def losses(x, y, weights, widths, distilled):
    """Of each width, the largest first: its own targets, then those of the largest."""
    found, soft = [], None
    for width in sorted(widths, reverse=True):
        log_p = log_softmax(logits(x, weights, width))
        if soft is None or not distilled:
            found.append(np.mean([-log_p[n, label] for n, label in enumerate(y)]))
        else:
            found.append(np.mean([-np.dot(soft[n], log_p[n]) for n in range(len(y))]))
        if soft is None:
            soft = np.exp(log_p)
    return found


def entropy(x, weights, width):
    """Of the largest's predictions: what cross-entropy with soft targets is above the KL."""
    log_p = log_softmax(logits(x, weights, width))
    return -np.mean(np.sum(np.exp(log_p) * log_p, 1))
