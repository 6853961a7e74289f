"""Round-to-nearest: uniform quantization of weights alone. Notes: papers/rtn.md.

For each row and each group of consecutive columns, with range [a, b] ∋ 0 and n = 2^bits - 1:
    s = (b - a) / n,   z = round(-a / s),   q = clip(round(w / s) + z, 0, n),   ŵ = s (q - z)
Symmetric grids take b = max|w|, a = -b, z = 2^(bits-1).
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms import hessian
from algorithms.formats import Format, integer
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.tensors import QuantizedTensor


def rtn(*, format: Format | None = None) -> LayerwiseMethod:
    """Rounding onto a format, by default 4-bit integers; data-free unless its search wants data."""
    format = integer() if format is None else format
    compress = functools.partial(quantize_weight, format=format)
    if not format.needs_data:
        return LayerwiseMethod(None, None, compress, row_block=format.rows)
    return hessian.method(compress, row_block=format.rows)


def quantize_weight(
    w: Float[Array, "o i"], stats: HessianStats | None = None, *, format: Format
) -> QuantizedTensor:
    """Round each weight to its group's grid; raises ValueError if groups do not divide i."""
    if stats is None:
        return format.quantize(w)
    dead = hessian.dead_inputs(stats)  # their weights are free: zero, so that no range covers them
    return format.quantize(jnp.where(dead, 0, w), stats.gram)
