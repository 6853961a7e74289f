"""The reference's steps, the rotation as one product on tensor cores.

±1 is exact in bfloat16, and so is a row of bfloat16 that was not normed. One that was is the sum of
two bfloat16 numbers to 2^-17: two products, where one in float32 would leave the tensor cores.
"""

import functools

import jax.numpy as jnp
from jax import lax

from kernels.quantize_rows.rotation import signs
from kernels.quantize_rows.rounding import add, quantize, round_to


def quantize_rows(x, residual, rms_weight, *, rms_epsilon, hadamard, dtype):
    y = total = add(x, residual)
    factor = jnp.ones((), y.dtype)
    if rms_weight is not None:
        factor = lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + rms_epsilon)
        y = y * rms_weight.astype(y.dtype)
    if hadamard and x.dtype == jnp.bfloat16:
        high = (total if rms_weight is None else round_to(y, x.dtype)).astype(x.dtype)
        parts = [high] if rms_weight is None else [high, (y - round_to(y, x.dtype)).astype(x.dtype)]
        y = functools.reduce(jnp.add, [_rotate(part, hadamard, y.dtype) for part in parts])
    elif hadamard:
        y = _rotate(y, hadamard, y.dtype)
    codes, scale = quantize(y * (factor * (hadamard or 1) ** -0.5), dtype)
    return codes, scale, None if residual is None else total.astype(x.dtype)


def _rotate(y, block, dtype):
    """Times the ±1 matrix, which is exact in every type."""
    blocks = y.reshape(-1, block)
    found = jnp.matmul(
        blocks, signs(block, y.dtype), precision="highest", preferred_element_type=dtype
    )
    return found.reshape(y.shape)
