"""A slow NumPy port, in float64, of one step of SpinQuant's optimizer on one square rotation.

https://github.com/facebookresearch/SpinQuant, train_utils/optimizer.py (SGDG.step with
stiefel=True, Cayley_loop, qr_retraction), commit 8f47aa3f00e8662caf1a484153920a07e5281c3a,
CC-BY-NC-4.0. Written anew from its formulas. Whether a step begins with a QR factorization is drawn
there, once in 101 times; here it is an argument. The momentum that the official code means to keep
is written to a variable that it then drops, so that there it is always zero; here it is returned.
"""

import numpy as np


def step(p, gradient, momentum_buffer, *, lr, momentum=0.0, qr=False):
    """The rotation and the momentum after one step."""
    x = p / (np.linalg.norm(p, axis=1, keepdims=True) + 1e-8)
    if qr:
        q, upper = np.linalg.qr(x.T)
        x = (q * np.sign(np.diag(upper))[None]).T
    v = momentum * momentum_buffer - gradient.T
    mx = v @ x
    w_hat = mx - 0.5 * x.T @ (x @ mx)
    w = w_hat - w_hat.T
    alpha = min(1.0 / (np.abs(w).sum(axis=0).max() + 1e-8), lr)
    y = x.T + alpha * v
    for _ in range(5):
        y = x.T + alpha * w @ (0.5 * (x.T + y))
    return y.T, w @ x.T
