"""Slow NumPy float64 ports of LSQ and LSQ+, the oracles of test_lsq.py.

No official code was published beyond the pseudocode in LSQ's appendix, which LSQ's port follows as
github.com/zhutmost/lsq-net has it at commit 00673a2 (MIT), `LsqQuan` in quan/quantizer/lsq.py, one
step per row. LSQ+ is `ALSQPlus` in quantization/lsqplus_quantize_V1.py of
github.com/ZouJiu1/LSQplus at commit 1e3221b (no licence is stated). Autograd's chain is derived by
hand: torch's `clamp` has slope 1 at its bounds. N of the gradient's scale is an argument, because
the codes do not agree on it.
"""

import math

import numpy as np


def limits(bits: int, positive: bool = False) -> tuple[int, int]:
    return (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def init_from(x, bits: int):
    """A step for each row."""
    return np.abs(x).mean(1, keepdims=True) * 2 / limits(bits)[1] ** 0.5


def lsq(x, s, upstream, bits: int, count: int):
    """Rounded x, and the gradients of x and s."""
    low, high = limits(bits)
    q = x / s
    clamped = np.clip(q, low, high)
    inside = (q >= low) & (q <= high)
    rounded = np.round(clamped)
    by_step = (upstream * (rounded - inside * q)).sum(1, keepdims=True)
    return rounded * s, upstream * inside, by_step / math.sqrt(count * high)


def lsq_plus(x, alpha, beta, upstream, bits: int, count: int):
    """Rounded x, and the gradients of x, the step and the offset; there `all_positive`."""
    low, high = limits(bits, positive=True)
    g = 1 / math.sqrt(count * high)
    q = (x - beta) / alpha
    smaller, bigger = q < low, q > high
    between = ~(smaller | bigger)
    dense = np.round(np.clip(q, low, high)) * alpha + beta
    by_step = smaller * low + bigger * high + between * (np.round(q) - q)
    by_step = (by_step * upstream * g).sum(1, keepdims=True)
    by_offset = (~between * upstream * g).sum(1, keepdims=True)
    return dense, between * upstream, by_step, by_offset
