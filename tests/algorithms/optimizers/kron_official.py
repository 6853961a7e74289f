"""A slow NumPy float64 port of PSGD-Kron, the oracle of test_kron.py.

Source: github.com/evanatyourservice/psgd_jax at commit be95524 (CC BY 4.0), `scale_by_kron` in
psgd_jax/kron.py, for one vector or matrix. What it draws (V, and whether Q is balanced) is given.
"""

import numpy as np

TINY = np.finfo(np.float64).tiny


class Kron:
    """step(gradient, v, balances) gives the update; v and balances are looked at if `due`."""

    def __init__(self, shape, *, probability, b1=0.9, max_size_triangular=8192,
                 min_ndim_triangular=2, momentum_into_precond_update=True, preconditioner_lr=0.1,
                 preconditioner_init_scale=1.0):  # fmt: skip
        self.probability, self.b1, self.lr = probability, b1, preconditioner_lr
        self.of_momentum = momentum_into_precond_update
        self.q = []
        for d in shape:
            diagonal = d == 1 or d > max_size_triangular or len(shape) < min_ndim_triangular
            q = np.ones(d) if diagonal else np.eye(d)
            self.q.append(preconditioner_init_scale ** (1 / len(shape)) * q)
        self.mu, self.count, self.counter = np.zeros(shape), 0, 0

    def step(self, gradient, v, balances):
        self.count += 1
        self.mu = self.b1 * self.mu + (1 - self.b1) * gradient
        momentum = self.mu / (1 - self.b1**self.count)
        self.counter += 1
        self.due = self.counter >= 1 / self.probability(self.count)
        if self.due:
            self.counter = 0
            self.fit(momentum if self.of_momentum else gradient, v, balances)
        move = momentum
        for axis, q in enumerate(self.q):
            move = along(axis, q**2 if q.ndim == 1 else q.T @ q, move)
        return move / max(1.0, np.sqrt(np.mean(move**2)) / 1.1)

    def fit(self, gradient, v, balances):
        if balances and len(self.q) > 1:
            norms = [np.max(np.abs(q)) for q in self.q]
            mean = np.prod(norms) ** (1 / len(norms))
            self.q = [mean / norm * q for q, norm in zip(self.q, norms, strict=True)]
        a = gradient + np.sqrt(np.finfo(np.float32).eps) * np.mean(np.abs(gradient)) * v
        b = v
        for axis, q in enumerate(self.q):
            a = along(axis, q, a)
            b = along(axis, 1 / q if q.ndim == 1 else np.linalg.inv(q).T, b)
        for axis, q in enumerate(self.q):
            first, second = outer(axis, a, q.ndim), outer(axis, b, q.ndim)
            change = self.lr * (first - second)
            if q.ndim == 1:
                self.q[axis] = q - change * q / (np.max(np.abs(first + second)) + TINY)
            else:
                change = np.triu(change) / (norm_lower_bound(first + second) + TINY)
                self.q[axis] = q - change @ q


def along(axis, q, x):
    """Q on an axis of x; a vector is a diagonal."""
    q = np.diag(q) if q.ndim == 1 else q
    return np.moveaxis(np.tensordot(q, x, axes=(1, axis)), 0, axis)


def outer(axis, x, ndim):
    """x xᵀ over all axes but one, or its diagonal."""
    rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return rows @ rows.T if ndim == 2 else np.sum(rows**2, axis=1)


def norm_lower_bound(x):
    largest = np.max(np.abs(x))
    if largest == 0:
        return largest
    x = x / largest
    by_column, by_row = np.sum(x**2, axis=0), np.sum(x**2, axis=1)
    if by_column.max() > by_row.max():
        y = x[:, np.argmax(by_column)] @ x
        return largest * np.linalg.norm((y / np.linalg.norm(y)) @ x.T)
    y = x @ x[np.argmax(by_row)]
    return largest * np.linalg.norm(x.T @ (y / np.linalg.norm(y)))
