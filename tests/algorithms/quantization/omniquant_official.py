"""A slow NumPy float64 port of OmniQuant's learnable weight clipping, the oracle of
test_omniquant.py.

Source: github.com/OpenGVLab/OmniQuant at commit 95fae1b (MIT): `UniformAffineQuantizer` with `lwc`
in quantize/quantizer.py, and its optimizer in quantize/omniquant.py, torch's AdamW at its defaults
with `lwc_lr` and no weight decay, for one linear layer. Autograd's chain is derived by hand:
`round_ste` has slope 1, `clamp` has slope 1 inside and at its bounds. The zero point is rounded by
`round()`, through which nothing flows. Groups are rows: w is [g, c], with factors [g].
"""

from typing import NamedTuple

import numpy as np

CLIPMIN, INIT = 1e-5, 4.0


class Factors(NamedTuple):
    upbound: np.ndarray  # [g]
    lowbound: np.ndarray  # [g]


class Forward(NamedTuple):
    dense: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray


def start(w) -> Factors:
    return Factors(np.full(len(w), INIT), np.full(len(w), INIT))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def forward(w, p: Factors, bits: int) -> Forward:
    """The asymmetric grid; ranges need not hold zero, as there."""
    top = 2**bits - 1
    high, low = sigmoid(p.upbound) * w.max(1), sigmoid(p.lowbound) * w.min(1)
    scale = np.clip((high - low) / top, CLIPMIN, 1e4)
    zero = np.round(np.clip(-low / scale, -1e4, 1e4))
    codes = np.clip(np.round(w / scale[:, None]) + zero[:, None], 0, top)
    return Forward((codes - zero[:, None]) * scale[:, None], codes, scale, zero)


def backward(w, p: Factors, f: Forward, upstream, bits: int) -> Factors:
    top = 2**bits - 1
    unclamped = np.round(w / f.scale[:, None]) + f.zero[:, None]
    inside = (unclamped >= 0) & (unclamped <= top)
    to_scale = (upstream * (f.codes - f.zero[:, None])).sum(1)
    to_scale -= (upstream * inside * w / f.scale[:, None]).sum(1)
    slopes = (sigmoid(v) * (1 - sigmoid(v)) for v in p)
    up, low = slopes
    return Factors(to_scale / top * w.max(1) * up, -to_scale / top * w.min(1) * low)


def tune(w, x, y, *, group_size, bits, steps, lr, eps=1e-8) -> list[tuple[Factors, Factors]]:
    """AdamW on the mean squared error of x Wᵀ against y: factors and gradient at each step."""
    groups, found = w.reshape(-1, group_size), []
    p = start(groups)
    first = second = Factors(np.zeros(len(groups)), np.zeros(len(groups)))
    for t in range(1, steps + 1):
        f = forward(groups, p, bits)
        error = x @ f.dense.reshape(w.shape).T - y
        upstream = (2 / error.size * error.T @ x).reshape(groups.shape)
        g = backward(groups, p, f, upstream, bits)
        found.append((p, g))
        first = Factors(*(0.9 * m + 0.1 * d for m, d in zip(first, g, strict=True)))
        second = Factors(*(0.999 * v + 0.001 * d**2 for v, d in zip(second, g, strict=True)))
        p = Factors(
            *(a - lr * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + eps)
              for a, m, v in zip(p, first, second, strict=True))
        )  # fmt: skip
    return found
