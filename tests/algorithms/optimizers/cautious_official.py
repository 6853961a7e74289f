"""A slow NumPy float64 port of the official C-AdamW, and of Algorithm 1 of Cautious Weight Decay.

C-AdamW: github.com/kyleliang919/C-Optim at commit 2c0517c, `c_adamw_update_foreach_async` of
c_adamw.py, its default path (MIT). Cautious Weight Decay: arXiv:2510.12402v2, Algorithm 1;
no official code was found (github.com/google-deepmind/simply at commit e14c061 has the plain decay
alone).
"""

import numpy as np


class Adam:
    def __init__(self, p, *, lr, wd, b1=0.9, b2=0.99, eps=1e-8):
        self.p, self.lr, self.wd, self.b1, self.b2, self.eps = p.copy(), lr, wd, b1, b2, eps
        self.m, self.v, self.t = np.zeros_like(p), np.zeros_like(p), 0

    def moments(self, g):
        self.t += 1
        self.m = self.m + (1 - self.b1) * (g - self.m)
        self.v = self.v + (1 - self.b2) * (g * g - self.v)
        return np.sqrt(self.v) / np.sqrt(1 - self.b2**self.t) + self.eps


class CautiousAdamW(Adam):
    def step(self, g):
        denominator = self.moments(g)
        mask = (self.m * g > 0).astype(float)
        direction = self.m * mask / denominator
        self.p = self.p * (1 - self.lr * self.wd)
        scale = self.lr / (1 - self.b1**self.t) / max(mask.mean(), 1e-3)
        self.p = self.p - direction * scale
        return self.p


class CautiousDecayAdamW(Adam):
    def step(self, g):
        u = self.m_hat(g)
        self.p = self.p - self.lr * (u + self.wd * (u * self.p >= 0) * self.p)
        return self.p

    def m_hat(self, g):
        denominator = self.moments(g)
        return self.m / (1 - self.b1**self.t) / denominator
