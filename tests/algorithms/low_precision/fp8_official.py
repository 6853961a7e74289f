"""A slow NumPy port of FP8 scaling in TransformerEngine, the oracle of test_fp8.py.

Source: github.com/NVIDIA/TransformerEngine at commit d0067d0, `DelayedScaleQuantizer` in
transformer_engine/jax/quantize/quantizer.py, `_default_sf_compute` in pytorch/quantization.py and
`compute_scale_from_amax` in common/recipe/recipe_common.cuh. FP8 numbers are those of ml_dtypes.
"""

import ml_dtypes
import numpy as np

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
F32_MAX = np.finfo(np.float32).max


def quantize(x, scale, dtype):
    peak = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(np.float32(x) * np.float32(scale), -peak, peak).astype(dtype)


class Current:
    def __init__(self, dtype):
        self.dtype = dtype

    def __call__(self, x):
        amax = np.float32(np.abs(x).max())
        self.scale = np.float32(1)
        if np.isfinite(amax) and amax != 0:
            self.scale = np.float32(ml_dtypes.finfo(self.dtype).max) / amax
        return quantize(x, self.scale, self.dtype), self.scale


class Delayed:
    def __init__(self, dtype, window, margin, algorithm):
        self.dtype, self.margin, self.algorithm = dtype, margin, algorithm
        self.scale, self.history = np.float32(1), np.zeros(window, np.float32)

    def __call__(self, x):
        used = self.scale
        q = quantize(x, used, self.dtype)
        self.history[0] = np.abs(x).max()
        amax = self.history.max() if self.algorithm == "max" else self.history[0]
        if amax > 0 and np.isfinite(amax):
            with np.errstate(over="ignore"):
                peak = np.float32(ml_dtypes.finfo(self.dtype).max)
                self.scale = min(peak / amax / np.float32(2**self.margin), F32_MAX)
        if len(self.history) > 1:
            self.history = np.roll(self.history, -1)
        self.history[0] = 0
        return q, used


def linear(quantizers, x, w, g):
    """y, ∂x and ∂w of x [n, i], w [i, o] and the gradient g [n, o]."""
    (qx, sx), (qw, sw), (qg, sg) = (q(t) for q, t in zip(quantizers, (x, w, g), strict=True))
    qx, qw, qg = (q.astype(np.float64) for q in (qx, qw, qg))
    sx, sw, sg = map(float, (sx, sw, sg))
    return qx @ qw / sx / sw, qg @ qw.T / sg / sw, qx.T @ qg / sx / sg
