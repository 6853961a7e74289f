"""Slow NumPy float64 ports of LoRA and DoRA, the oracle of test_lora.py and test_dora.py.

Source: github.com/huggingface/peft at commit 5d602fd (Apache-2.0): `Linear.forward` in src/peft/
tuners/lora/layer.py and `DoraLinearLayer.forward` in dora.py beside it, without dropout. The norm
is detached there. Autograd's chain is derived by hand. lora_A is [r, i], lora_B [o, r].
"""

from typing import NamedTuple

import numpy as np


class Adapter(NamedTuple):
    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None  # None: LoRA

    def descended(self, gradient: "Adapter", rate: float) -> "Adapter":
        return Adapter(
            *(None if p is None else p - rate * g for p, g in zip(self, gradient, strict=True))
        )


def weight_norm(weight, adapter: Adapter, scaling: float):
    return np.linalg.norm(weight + scaling * adapter.lora_B @ adapter.lora_A, axis=1)


def forward(x, weight, adapter: Adapter, scaling: float):
    result = x @ weight.T
    lora_result = x @ adapter.lora_A.T @ adapter.lora_B.T
    if adapter.magnitude is None:
        return result + lora_result * scaling
    mag_norm_scale = adapter.magnitude / weight_norm(weight, adapter, scaling)
    return result + (mag_norm_scale - 1) * (x @ weight.T) + mag_norm_scale * lora_result * scaling


def backward(x, weight, adapter: Adapter, scaling: float, upstream) -> Adapter:
    """upstream: ∂L/∂y [n, o]."""
    scaled, by_magnitude = upstream, None
    if adapter.magnitude is not None:
        norm = weight_norm(weight, adapter, scaling)
        directions = x @ (weight + scaling * adapter.lora_B @ adapter.lora_A).T / norm
        by_magnitude = (upstream * directions).sum(0)
        scaled = upstream * adapter.magnitude / norm
    by_a = scaling * (scaled @ adapter.lora_B).T @ x
    by_b = scaling * scaled.T @ (x @ adapter.lora_A.T)
    return Adapter(by_a, by_b, by_magnitude)
