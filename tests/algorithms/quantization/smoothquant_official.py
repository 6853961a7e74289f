"""A slow NumPy float64 port of the official SmoothQuant code, the oracle of test_smoothquant.py.

Source: github.com/mit-han-lab/smoothquant at commit c61476d (MIT): `get_act_scales` in
smoothquant/calibration.py, `smooth_ln_fcs_llama_like` in smoothquant/smooth.py, the two `_absmax`
functions for channels and tokens in smoothquant/fake_quant.py.
"""

from collections.abc import Sequence

import numpy as np


def activation_scales(batches: Sequence[np.ndarray]) -> np.ndarray:
    """The largest magnitude of each channel over batches [n, i]."""
    peak = np.abs(batches[0]).max(0)
    for x in batches[1:]:
        peak = np.maximum(peak, np.abs(x).max(0))
    return peak


def smooth(
    norm: np.ndarray, layers: Sequence[np.ndarray], peak: np.ndarray, alpha: float
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """The norm's scale [i] and its readers' weights [o, i] after smoothing, and the scales."""
    weight_peak = np.maximum(np.stack([np.abs(w).max(0) for w in layers]).max(0), 1e-5)
    scale = np.maximum(peak**alpha / weight_peak ** (1 - alpha), 1e-5)
    return norm / scale, [w * scale for w in layers], scale


def absmax_rows(x: np.ndarray, bits: int = 8) -> np.ndarray:
    """Each row rounded onto 2^bits - 1 points, zero in the middle: channels of W, tokens of X."""
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5) / top
    return np.round(x / scale) * scale
