"""A slow NumPy float64 port of the official AutoRound code, the oracle of test_autoround.py.

Source: github.com/intel/auto-round at commit b9f3d00 (Apache-2.0): `quant_tensor_asym`,
`quant_tensor_sym` and `quant_tensor_sym_gptq` in auto_round/data_type/int.py, `_single_tensor_sgd`
in sign_sgd.py and the loop over steps in quantizer.py, both of
auto_round/algorithms/quantization/sign_round, and `_qdq_weight` in auto_round/wrapper.py, for one
linear layer. Autograd's chain is derived by hand, operation by operation: `round_ste` and
`.to(dtype)` have slope 1, `torch.clamp` has slope 1 inside and at its bounds, `torch.max` of two
equal numbers halves the gradient. Groups are rows: w is [g, c], with ranges' factors [g].
"""

from typing import NamedTuple

import numpy as np

THRESHOLD = 1e-5  # of scales


class Forward(NamedTuple):
    """What a layer's groups become, and what `backward` needs."""

    dense: np.ndarray  # [g, c]
    codes: np.ndarray  # [g, c], from 0 on
    scale: np.ndarray  # [g]
    zero: np.ndarray  # [g]
    low: np.ndarray  # [g], wmin
    high: np.ndarray  # [g], wmax


class Parameters(NamedTuple):
    value: np.ndarray  # [g, c]
    min_scale: np.ndarray  # [g]
    max_scale: np.ndarray  # [g]


def start(w: np.ndarray) -> Parameters:
    return Parameters(np.zeros_like(w), np.ones(len(w)), np.ones(len(w)))


def clamp(p: Parameters) -> Parameters:
    """What `_qdq_weight` does to the data of both factors before each forward pass."""
    return Parameters(p.value, np.clip(p.min_scale, 0, 1), np.clip(p.max_scale, 0, 1))


def forward(w, p: Parameters, bits: int, sym: bool, half: bool = False) -> Forward:
    """`int_asym`, or with `sym` the data type int_sym_gptq. half: the scale's dtype is float16."""
    maxq = 2**bits - 1
    low, high = np.minimum(w.min(1), 0) * p.min_scale, np.maximum(w.max(1), 0) * p.max_scale
    if sym:
        high = np.maximum(np.abs(low), high)
        low = np.where(low < 0, -high, low)
    scale = (high - low) / maxq
    scale = np.maximum(scale.astype(np.float16).astype(float) if half else scale, THRESHOLD)
    zero = np.full_like(scale, (maxq + 1) / 2) if sym else np.round(-low / scale)
    codes = np.clip(np.round(w / scale[:, None] + p.value) + zero[:, None], 0, maxq)
    return Forward(scale[:, None] * (codes - zero[:, None]), codes, scale, zero, low, high)


def full_range(w, p: Parameters, bits: int) -> np.ndarray:
    """The data type int_sym: the larger end is -2^(bits-1) steps, which may be negative ones."""
    maxq = 2 ** (bits - 1)
    low, high = -np.minimum(w.min(1), 0) * p.min_scale, np.maximum(w.max(1), 0) * p.max_scale
    scale = np.where(high < low, 1, -1) * np.maximum(high, low) / maxq
    scale = np.where(scale < 0, np.minimum(scale, -THRESHOLD), np.maximum(scale, THRESHOLD))
    q = np.clip(np.round(w / scale[:, None] + p.value), -maxq, maxq - 1)
    return scale[:, None] * q


def backward(w, p: Parameters, f: Forward, upstream, bits: int, sym: bool) -> Parameters:
    """The gradient of a loss whose gradient in `dense` is `upstream` [g, c]."""
    maxq = 2**bits - 1
    unclamped = np.round(w / f.scale[:, None] + p.value) + f.zero[:, None]
    inside = (unclamped >= 0) & (unclamped <= maxq)
    to_codes = upstream * f.scale[:, None] * inside  # through q of scale (q - zp)
    to_zero = to_codes.sum(1) - (upstream * f.scale[:, None]).sum(1)
    to_scale = (upstream * (f.codes - f.zero[:, None])).sum(1)
    to_scale += (to_codes * -w / f.scale[:, None] ** 2).sum(1)
    to_low = np.zeros(len(w))
    if not sym:
        to_scale += to_zero * f.low / f.scale**2
        to_low = -to_zero / f.scale
    to_scale = np.where(f.scale > THRESHOLD, to_scale, 0)
    to_low, to_high = to_low - to_scale / maxq, to_scale / maxq
    if sym:
        low, high = np.minimum(w.min(1), 0) * p.min_scale, np.maximum(w.max(1), 0) * p.max_scale
        to_high = np.where(low < 0, to_high - to_low, to_high)  # wmin_new = -wmax_new
        to_low = np.where(low < 0, 0, to_low)
        share = np.where(-low > high, 0, np.where(-low < high, 1, 0.5))
        to_low, to_high = to_low - to_high * (1 - share), to_high * share
    return Parameters(to_codes, to_low * np.minimum(w.min(1), 0), to_high * np.maximum(w.max(1), 0))


class Step(NamedTuple):
    parameters: Parameters  # as the forward pass of this step used them
    gradient: Parameters
    loss: float


def tune(w, x, y, p: Parameters, *, bits, sym, iters, lr, minmax_lr) -> list[Step]:
    """Signed descent from `p` on the mean squared error of x Wᵀ against y, as the loop over `iters`
    takes it, with all of x in every batch. w: [o, i].
    """
    groups, steps = w.reshape(p.value.shape), []
    for i in range(iters):
        p = clamp(p)
        f = forward(groups, p, bits, sym)
        error = x @ f.dense.reshape(w.shape).T - y
        upstream = (2 / error.size * error.T @ x).reshape(groups.shape)
        gradient = backward(groups, p, f, upstream, bits, sym)
        steps.append(Step(p, gradient, float(np.mean(error**2))))
        decay = 1 - i / iters  # LinearLR from 1 to 0
        p = Parameters(
            *(v - decay * rate * np.sign(g)
              for v, g, rate in zip(p, gradient, (lr, minmax_lr, minmax_lr), strict=True))
        )  # fmt: skip
    return steps
