"""A slow NumPy port of the official RigL and SET, the oracle of test_rigl.py and test_set.py.

Source: github.com/google-research/rigl at commit d39fc7d, `SparseSETOptimizerBase` and
`SparseRigLOptimizerBase` in rigl/sparse_optimizers_base.py around TensorFlow's momentum optimizer,
and `get_sparsities_erdos_renyi` in rigl/sparse_utils.py. Noise in what is dropped is left out, and
so are other ways to begin new weights than at zero. There a step that changes RigL's mask does not
advance the global step; here it does, as in the paper's Algorithm 1.
"""

import math

import numpy as np


class Sparse:
    """One layer: dense weights with a mask beside them. RigL by gradients, SET by given scores."""

    def __init__(self, w, mask, *, begin, end, frequency, drop, anneal, lr, momentum):
        self.w, self.mask, self.accumulated = w.copy(), mask.astype(float), np.zeros_like(w)
        self.begin, self.end, self.frequency = begin, end, frequency
        self.drop, self.anneal, self.lr, self.momentum = drop, anneal, lr, momentum
        self.step, self.last = 0, -frequency

    def rigl(self, dense_gradient):
        if self._due():
            self._update_mask(np.abs(dense_gradient))
        else:
            self._momentum(dense_gradient)
        self.step += 1

    def set(self, dense_gradient, scores):
        self._momentum(dense_gradient)
        self.step += 1
        if self._due():
            self._update_mask(scores)

    def _due(self):
        within = self.begin <= self.step and (self.step <= self.end or self.end < 0)
        return within and self.last + self.frequency <= self.step

    def _momentum(self, dense_gradient):
        self.accumulated = self.momentum * self.accumulated + self.mask * dense_gradient
        self.w = self.w - self.lr * self.accumulated

    def _fraction(self):
        if self.anneal == "constant":
            return self.drop
        decayed = min(self.step, self.end - self.begin) / (self.end - self.begin)
        return self.drop * 0.5 * (1 + math.cos(math.pi * decayed))

    def _update_mask(self, score_grow):
        score_drop = np.abs(self.mask * self.w).reshape(-1)
        ones = int(self.mask.sum())
        prune = int(np.float32(ones) * np.float32(self._fraction()))
        keep = np.zeros(score_drop.size)
        keep[np.argsort(-score_drop, kind="stable")[: ones - prune]] = 1
        score_grow = score_grow.reshape(-1)
        lifted = np.where(keep == 1, score_grow.min() - 1, score_grow)
        grown = np.zeros(score_drop.size)
        grown[np.argsort(-lifted, kind="stable")[:prune]] = 1
        assert (keep * grown).sum() == 0
        new = (grown.reshape(self.mask.shape) == 1) & (self.mask == 0)
        self.w = np.where(new, 0.0, self.w)
        self.accumulated = np.where(new, 0.0, self.accumulated)
        self.mask = (keep + grown).reshape(self.mask.shape)
        self.last = self.step


def erdos_renyi(shapes: dict[str, tuple[int, ...]], default_sparsity: float) -> dict[str, int]:
    """The number of ones of each mask."""
    dense: set[str] = set()
    while True:
        divisor, rhs, raw = 0.0, 0, {}
        for name, shape in shapes.items():
            n_param = int(np.prod(shape))
            n_zeros = int(np.floor(default_sparsity * n_param))
            if name in dense:
                rhs -= n_zeros
            else:
                rhs += n_param - n_zeros
                raw[name] = np.sum(shape) / np.prod(shape)
                divisor += raw[name] * n_param
        eps = rhs / divisor
        most = max(raw.values())
        if most * eps <= 1:
            break
        dense |= {name for name, each in raw.items() if each == most}
    ones = {}
    for name, shape in shapes.items():
        sparsity = 0.0 if name in dense else 1.0 - eps * raw[name]
        ones[name] = int(np.prod(shape)) - int(np.floor(sparsity * np.prod(shape)))
    return ones
