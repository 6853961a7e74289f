"""A slow NumPy float64 port of the official SOAP code, the oracle of test_soap.py.

Source: github.com/nikhilvyas/SOAP at commit a1e5535 (MIT), `SOAP` in soap.py, for one matrix,
without weight decay, learning rate 1. Its eigenvectors and QR are of float32; here of float64.
"""

import numpy as np


class Soap:
    """step(gradient) gives what the parameter changes by."""

    def __init__(self, shape, *, betas=(0.95, 0.95), shampoo_beta=-1, eps=1e-8,
                 precondition_frequency=10, max_precond_dim=10000, normalize_grads=False,
                 correct_bias=True):  # fmt: skip
        self.betas, self.eps, self.frequency = betas, eps, precondition_frequency
        self.shampoo_beta = shampoo_beta if shampoo_beta >= 0 else betas[1]
        self.normalize_grads, self.correct_bias = normalize_grads, correct_bias
        self.axes = [axis for axis in (0, 1) if shape[axis] <= max_precond_dim]
        self.gg = {axis: np.zeros((shape[axis],) * 2) for axis in self.axes}
        self.q = None
        self.exp_avg, self.exp_avg_sq, self.count = np.zeros(shape), np.zeros(shape), 0

    def project(self, x):
        for axis in self.axes:
            x = self.q[0].T @ x if axis == 0 else x @ self.q[1]
        return x

    def project_back(self, x):
        for axis in self.axes:
            x = self.q[0] @ x if axis == 0 else x @ self.q[1].T
        return x

    def step(self, gradient):
        if self.q is None:
            self.update_preconditioner(gradient)
            return np.zeros_like(gradient)
        self.count += 1
        b1, b2 = self.betas
        projected = self.project(gradient)
        self.exp_avg = b1 * self.exp_avg + (1 - b1) * projected
        self.exp_avg_sq = b2 * self.exp_avg_sq + (1 - b2) * projected**2
        size = 1.0
        if self.correct_bias:
            size = (1 - b2**self.count) ** 0.5 / (1 - b1**self.count)
        move = self.project_back(self.exp_avg / (np.sqrt(self.exp_avg_sq) + self.eps))
        if self.normalize_grads:
            move = move / (1e-30 + np.mean(move**2) ** 0.5)
        self.update_preconditioner(gradient)
        return -size * move

    def update_preconditioner(self, gradient):
        if self.q is not None:
            self.exp_avg = self.project_back(self.exp_avg)
        for axis in self.axes:
            outer = gradient @ gradient.T if axis == 0 else gradient.T @ gradient
            self.gg[axis] += (1 - self.shampoo_beta) * (outer - self.gg[axis])
        if self.q is None:
            self.q = {axis: np.linalg.eigh(self.gg[axis])[1][:, ::-1] for axis in self.axes}
        if self.count > 0 and self.count % self.frequency == 0:
            self.refresh()
        if self.count > 0:
            self.exp_avg = self.project(self.exp_avg)

    def refresh(self):
        for axis in self.axes:
            estimates = np.diag(self.q[axis].T @ self.gg[axis] @ self.q[axis])
            order = np.argsort(-estimates)
            self.exp_avg_sq = np.take(self.exp_avg_sq, order, axis)
            self.q[axis] = np.linalg.qr(self.gg[axis] @ self.q[axis][:, order])[0]
