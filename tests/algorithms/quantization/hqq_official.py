"""A slow NumPy float64 port of the official HQQ code, the oracle of test_hqq.py.

Source: github.com/mobiusml/hqq at commit e0b1d00, `Quantizer.quantize` in hqq/core/quantize.py and
`optimize_weights_proximal_v2`, `optimize_weights_proximal_legacy` in hqq/core/optimize.py
(Apache-2.0), for axis=1 and a tensor whose rows are groups. As there, scales are kept inverted, and
one stop serves the whole tensor. Left out: half precision, packing, the search for scales.
"""

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """Codes [n, c], step and zero point [n, 1] of n groups; stopped: before the last iteration."""

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    stopped: bool

    @property
    def q(self) -> np.ndarray:
        return (self.codes - self.zero) * self.scale


def start(w: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse step and the real zero point that cover each row of w."""
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    span = high - low
    inverse = np.where(np.abs(span) <= 1e-4, 1.0, (2**bits - 1) / np.where(span == 0, 1, span))
    inverse = np.minimum(inverse, 2e4)
    return inverse, -low * inverse


def shrink(x: np.ndarray, beta: float, p: float) -> np.ndarray:
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        threshold = size ** (p - 1) / beta
    return np.sign(x) * np.maximum(size - threshold, 0)


def quantize(
    w: np.ndarray,
    bits: int,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    legacy: bool = False,
) -> Result:
    """legacy: the solver that the official class calls; else `v2` with its early stop."""
    inverse, zero = start(w, bits)
    best_error, best_zero, stopped = np.inf if legacy else 1e4, zero, False
    for _ in range(iterations):
        codes = _codes(w, inverse, zero, bits)
        delta = w - (codes - zero) / inverse
        update = np.mean(codes - (w - shrink(delta, beta, p)) * inverse, 1, keepdims=True)
        if np.abs(delta).mean() < best_error:
            best_error, best_zero = np.abs(delta).mean(), zero
        else:
            stopped = True
            zero = update if legacy else best_zero
            break
        zero, beta = update, beta if legacy else beta * kappa
    return Result(_codes(w, inverse, zero, bits), 1 / inverse, zero, stopped)


def _codes(w, inverse, zero, bits):
    return np.clip(np.round(w * inverse + zero), 0, 2**bits - 1)
