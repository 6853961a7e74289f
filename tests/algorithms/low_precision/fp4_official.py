"""Slow NumPy ports of FP4 rounding, the oracles of test_mxfp4.py and test_nvfp4.py.

MXFP4 with its random Hadamard transform: github.com/amazon-science/mxfp4-llm at commit 0cc57fe, the
backward pass in patch_override_scripts/te1.5/linear.py and `round='dither_scale'` in
microxcaling.patch, over `_quantize_mx` and `_quantize_elemwise_core` of github.com/microsoft/
microxcaling (mx/mx_ops.py at 3b429a8, mx/elemwise_ops.py at 4adf988).

NVFP4: github.com/NVIDIA/TransformerEngine at commit d0067d0, `NVFP4QuantizerRef` in
transformer_engine/pytorch/custom_recipes/reference_nvfp4.py, which rounds to the nearest; rounding
at random between the same neighbours is that of the paper. Random numbers are arguments: a number
goes up by the largest ones, and ours by the smallest.
"""

import ml_dtypes
import numpy as np
import scipy.linalg

F32 = np.float32


def rotate(x, signs):
    """x [p, k], k in whole blocks."""
    size = len(signs)
    s = scipy.linalg.hadamard(size) / size**0.5 * signs[:, None]
    return (x.reshape(-1, size) @ s).reshape(x.shape)


def elemwise(a, uniform):
    """E2M1 by floor(|a| + uniform) in steps of the mantissa."""
    exponent = np.maximum(np.floor(np.log2(np.abs(a) + (a == 0))), 0)
    steps = np.abs(a) / 2**exponent * 2
    return np.clip(np.sign(a) * np.floor(steps + uniform) / 2 * 2**exponent, -6, 6)


def mxfp4_dither(x, uniform):
    """x float32 in groups of 32 along the last axis."""
    a = x.reshape(-1, 32)
    largest = np.abs(a).max(1, keepdims=True)
    shared = np.floor(np.log2(np.where(largest == 0, F32(2.0**-126), largest))) - 2
    a = elemwise(3 * a / 2 ** (shared + 2), uniform.reshape(a.shape))
    return (a * 2 ** (shared + 2) / 3).reshape(x.shape)


def nvfp4(x, uniform=None, rows=1):
    """x float32 [p, k] in groups of rows × 16."""
    p, k = x.shape
    blocks = np.abs(x).reshape(p // rows, rows, k // 16, 16)
    largest = np.repeat(blocks.max((1, 3)), rows, 0)[..., None]
    encode = min(F32(448 * 6) / F32(np.abs(x).max()), np.finfo(F32).max)
    decode = np.clip(largest * (encode * F32(1 / F32(6))), -448, 448)
    decode = decode.astype(ml_dtypes.float8_e4m3fn).astype(F32)
    scaled = np.clip(x.reshape(p, k // 16, 16) * (1 / (decode * (1 / encode))), -6, 6)
    if uniform is None:
        q = scaled.astype(ml_dtypes.float4_e2m1fn).astype(F32)
    else:
        q = elemwise(scaled, uniform.reshape(scaled.shape))
    return (q * decode).reshape(p, k) / encode
