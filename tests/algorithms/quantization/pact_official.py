"""A slow NumPy float64 port of PACT, the oracle of test_pact.py.

Source: github.com/foundation-model-stack/fms-model-optimizer at commit 308643f (Apache-2.0), by the
paper's laboratory: `PACT_STE`, the one-sided original, in fms_mo/quant/quantizers.py, for inputs
that are not negative.
"""

import numpy as np


def forward(x, clip_val: float, num_bits: int):
    scale = (2**num_bits - 1) / clip_val
    return np.round(scale * np.minimum(x, clip_val)) / scale


def backward(x, clip_val: float, grad_output):
    """The gradients of x and clip_val."""
    by_input = np.where((x < 0) | (x > clip_val), 0, grad_output)
    return by_input, np.where(x < clip_val, 0, grad_output).sum()
