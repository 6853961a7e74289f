"""A slow NumPy float64 port of EfficientQAT's Block-AP, the oracle of test_efficient_qat.py.

Source: github.com/OpenGVLab/EfficientQAT at commit 78fd3fb (no licence is stated):
`UniformAffineQuantizer.fake_quant` in quantize/quantizer.py and the optimizer of quantize/
block_ap.py, torch's AdamW without weight decay, with a rate for weights and one for scales and zero
points; its schedule is left out. For one linear layer; groups are rows. Autograd's chain is derived
by hand: `round_ste` and `clamp_ste` have slope 1, torch's `clamp` has slope 1 inside and at its
bounds.
"""

from typing import NamedTuple

import numpy as np


class Parameters(NamedTuple):
    weight: np.ndarray  # [g, c]
    scale: np.ndarray  # [g, 1]
    zero_point: np.ndarray  # [g, 1]


def start(w, bits: int) -> Parameters:
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    scale = np.clip((high - low) / (2**bits - 1), 1e-4, 1e4)
    return Parameters(w, scale, np.round(-np.clip(low / scale, -1e4, 1e4)))


def fake_quant(p: Parameters, bits: int):
    """What the weight is rounded to, its codes, and where they are not clamped."""
    top = 2**bits - 1
    zero = np.clip(np.round(p.zero_point), 0, top)
    codes = np.round(p.weight / p.scale) + zero
    inside, codes = (codes >= 0) & (codes <= top), np.clip(codes, 0, top)
    return (codes - zero) * p.scale, codes - zero, inside


def backward(p: Parameters, upstream, bits: int) -> Parameters:
    _, steps, inside = fake_quant(p, bits)
    by_scale = upstream * (steps - inside * p.weight / p.scale)
    by_zero = -upstream * ~inside * p.scale
    return Parameters(upstream * inside, by_scale.sum(1)[:, None], by_zero.sum(1)[:, None])


def tune(w, x, y, *, group_size, bits, steps, quant_lr, weight_lr) -> list[Parameters]:
    """AdamW on the mean squared error of x Wᵀ against y: the parameters before each step."""
    p = start(w.reshape(-1, group_size), bits)
    rates, found = Parameters(weight_lr, quant_lr, quant_lr), []
    first = second = Parameters(*(np.zeros_like(a) for a in p))
    for t in range(1, steps + 1):
        found.append(p)
        dense = fake_quant(p, bits)[0].reshape(w.shape)
        upstream = 2 / y.size * (x @ dense.T - y).T @ x
        g = backward(p, upstream.reshape(p.weight.shape), bits)
        first = Parameters(*(0.9 * m + 0.1 * d for m, d in zip(first, g, strict=True)))
        second = Parameters(*(0.999 * v + 0.001 * d**2 for v, d in zip(second, g, strict=True)))
        p = Parameters(
            *(a - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
              for a, rate, m, v in zip(p, rates, first, second, strict=True))
        )  # fmt: skip
    return found
