"""Slow NumPy float64 ports of the authors' SNOO and EMA-Nesterov, the oracles of test_outer.py.

SNOO: class `Snoo` in records/track_2_medium/2025-09-16_Snoo of
github.com/KellerJordan/modded-nanogpt at commit f411b3d (MIT), with torch.optim.SGD's Nesterov
momentum written out. EMA-Nesterov: github.com/OptimAI-Lab/ema-nesterov-module at commit b17729a,
ema_nesterov.py, without its scheduled step size.
"""

import numpy as np


class Snoo:
    """`current_step` as the authors' state_dict has it: it is 0 there at first."""

    def __init__(self, params, *, lr, momentum, k, current_step=0):
        self.lr, self.momentum, self.k, self.current_step = lr, momentum, k, current_step
        self.outer = {name: p.copy() for name, p in params.items()}
        self.buffers = {}

    def step(self, params):
        """After each inner step: what the parameters are set to."""
        due, self.current_step = self.current_step % self.k == 0, self.current_step + 1
        if not due:
            return params
        for name, p in params.items():
            g = self.outer[name] - p
            buffer = self.buffers.get(name)
            self.buffers[name] = buffer = g if buffer is None else self.momentum * buffer + g
            self.outer[name] = self.outer[name] - self.lr * (g + self.momentum * buffer)
        return {name: p.copy() for name, p in self.outer.items()}


class EmaNesterov:
    """Around a function that steps from parameters, given gradients."""

    def __init__(self, params, inner, *, lookahead_stepsize, lookahead_ema, warmup_step, rest_step):
        self.p, self.inner, self.it = params.copy(), inner, 0
        self.beta, self.ema = lookahead_stepsize, lookahead_ema
        self.warmup, self.rest = warmup_step, rest_step
        self.previous, self.buffer = params.copy(), np.zeros_like(params)

    def nesterov_step(self):
        if self.it + 1 > self.warmup and self.it < self.rest:
            self.p = self.p + self.beta * self.buffer
        return self.p

    def step(self, g):
        self.p = self.inner(self.p, g)
        self.buffer = self.buffer + (1 - self.ema) * (self.p - self.previous - self.buffer)
        self.previous = self.p.copy()
        self.it += 1
        return self.p
