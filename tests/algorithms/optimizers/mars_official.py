"""A slow NumPy float64 port of the official MARS, the oracle of test_mars.py.

Source: github.com/AGI-Arena/MARS at commit 4831e28, `update_fn` of MARS/optimizers/mars.py, the
approximate variant without amsgrad (Apache-2.0): one parameter's step.
"""

import numpy as np


class Mars:
    def __init__(self, p, *, lr, wd, betas, gamma=0.025, eps=1e-8, kind="mars-adamw"):
        self.p, self.lr, self.wd, self.betas = p.copy(), lr, wd, betas
        self.gamma, self.eps, self.kind, self.t = gamma, eps, kind, 0
        self.m, self.v, self.last = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)

    def step(self, g):
        b1, b2 = self.betas
        self.t += 1
        c = g
        if self.kind != "adamw":
            c = (g - self.last) * (self.gamma * (b1 / (1 - b1))) + g
            norm = np.linalg.norm(c)
            if norm > 1:
                c = c / norm
        self.m = b1 * self.m + (1 - b1) * c
        self.v = b2 * self.v + (1 - b2) * c * c
        if self.kind == "mars-lion":
            direction = np.sign(self.m)
        else:
            root = np.sqrt(self.v) / np.sqrt(1 - b2**self.t) + self.eps
            direction = self.m / (root * (1 - b1**self.t))
        self.p = self.p - self.lr * (self.wd * self.p + direction)
        self.last = g
        return self.p
