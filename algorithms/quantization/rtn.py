"""Round-to-nearest: uniform quantization of weights alone. Notes: papers/rtn.md.

For each row and each group of consecutive columns, with range [a, b] ∋ 0 and n = 2^bits - 1:
    s = (b - a) / n,   z = round(-a / s),   q = clip(round(w / s) + z, 0, n),   ŵ = s (q - z)
Symmetric grids take b = max|w|, a = -b, z = 2^(bits-1).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod
from algorithms.numerics import IntegerGrid
from algorithms.tensors import QuantizedTensor


def rtn(**grid) -> LayerwiseMethod:
    """Data-free rounding onto an `IntegerGrid`, whose fields are the hyperparameters."""
    return LayerwiseMethod(None, None, functools.partial(quantize_weight, grid=IntegerGrid(**grid)))


def quantize_weight(
    w: Float[Array, "o i"], stats: None = None, *, grid: IntegerGrid
) -> QuantizedTensor:
    """Round each weight to its group's grid; raises ValueError if groups do not divide i."""
    groups = w.reshape(w.shape[0], -1, grid.columns_per_group(w))
    scale, zero = grid.fit(groups)
    codes = grid.quantize(groups, scale, zero).astype(jnp.uint8)
    return QuantizedTensor.from_codes(codes.reshape(w.shape), *grid.stored(scale, zero), grid.bits)
