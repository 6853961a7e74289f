"""A slow NumPy float64 port of the official KL-Shampoo and KL-SOAP, the oracle of
test_kl_shampoo.py.

Source: github.com/yorkerlin/KL-Methods at commit a02e622 (no licence is stated), `KLOpt` in
optim/kl_opt.py, for one matrix, without weight decay or damping of the factors, learning rate 1. It
computes in bfloat16 unless told otherwise; here everything is of float64.
"""

import numpy as np


class KL:
    """step(gradient) gives what the parameter changes by."""

    def __init__(self, shape, *, betas=(0.9, 0.98), eps=1e-8, precondition_frequency=10,
                 using_klsoap=False, normalize_grads=False, init_factor=0.1,
                 max_clamp_value=4000):  # fmt: skip
        (self.b1, self.b2), self.eps, self.frequency = betas, eps, precondition_frequency
        self.using_klsoap, self.normalize_grads = using_klsoap, normalize_grads
        self.inverse_roots = [np.full(d, init_factor**-0.5) for d in shape]
        self.clamps = [max(10, min(d, max_clamp_value)) for d in shape]
        self.gg = [np.zeros((d, d)) for d in shape]
        self.q = None
        self.exp_avg, self.exp_avg_sq, self.count = np.zeros(shape), np.zeros(shape), 0

    def project(self, x):
        return self.q[0].T @ x @ self.q[1]

    def project_back(self, x):
        return self.q[0] @ x @ self.q[1].T

    def step(self, gradient):
        if self.q is None:
            m, n = gradient.shape
            self.gg[0] += (1 - self.b2) * gradient @ gradient.T / n
            self.gg[1] += (1 - self.b2) * gradient.T @ gradient / m
            self.q = [np.linalg.eigh(each)[1][:, ::-1] for each in self.gg]
            return np.zeros_like(gradient)
        self.count += 1
        move = self.klsoap(gradient) if self.using_klsoap else self.klshampoo(gradient)
        self.update_preconditioner(gradient)
        if self.normalize_grads:
            move = move / (1e-30 + np.mean(move**2) ** 0.5)
        return -move

    def klshampoo(self, gradient):
        self.exp_avg = self.exp_avg + (1 - self.b1) * (gradient - self.exp_avg)
        root = self.inverse_roots[0][:, None] * self.inverse_roots[1][None, :]
        return self.project_back(self.project(self.exp_avg) * root / (1 + root * self.eps))

    def klsoap(self, gradient):
        projected = self.project(gradient)
        self.exp_avg = self.exp_avg + (1 - self.b1) * (projected - self.exp_avg)
        self.exp_avg_sq += (1 - self.b2) * (projected**2 - self.exp_avg_sq)
        return self.project_back(self.exp_avg / (np.sqrt(self.exp_avg_sq) + self.eps))

    def update_preconditioner(self, gradient):
        refresh = self.count % self.frequency == 0
        if self.using_klsoap and refresh:
            self.exp_avg = self.project_back(self.exp_avg)
        (m, n), (left, right) = gradient.shape, self.inverse_roots
        by_left = left[:, None] * (self.q[0].T @ gradient)
        by_right = right[:, None] * (self.q[1].T @ gradient.T)
        self.gg[0] = self.b2 * self.gg[0] + (1 - self.b2) / n * by_right.T @ by_right
        self.gg[1] = self.b2 * self.gg[1] + (1 - self.b2) / m * by_left.T @ by_left
        both = self.project(gradient)
        diagonals = (np.mean((both * right) ** 2, 1), np.mean((both * left[:, None]) ** 2, 0))
        for axis, diagonal in enumerate(diagonals):
            eigenvalues = self.inverse_roots[axis] ** -2
            eigenvalues = eigenvalues + (1 - self.b2) * (diagonal - eigenvalues)
            self.inverse_roots[axis] = np.minimum(eigenvalues**-0.5, self.clamps[axis])
        if refresh:
            self.q = [np.linalg.qr(gg @ q)[0] for gg, q in zip(self.gg, self.q, strict=True)]
            if self.using_klsoap:
                self.exp_avg = self.project(self.exp_avg)
