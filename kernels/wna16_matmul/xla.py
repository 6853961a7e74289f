"""Dequantize into x's dtype, then one product: the best form on a CPU at every width of x."""

import jax.numpy as jnp

from kernels.packing import unpack


def wna16_matmul(x, packed, scale, zero, *, bits):
    *m, i = x.shape
    o, groups = scale.shape
    codes = unpack(packed, bits, i).reshape(o, groups, i // groups).astype(x.dtype)
    offset = 2 ** (bits - 1) if zero is None else zero[:, :, None].astype(x.dtype)
    w = ((codes - offset) * scale[:, :, None].astype(x.dtype)).reshape(o, i)
    # Two axes: XLA's CPU product of a batched x is far slower.
    return jnp.einsum("mi,oi->mo", x.reshape(-1, i), w).reshape(*m, o)
