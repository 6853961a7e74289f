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
    if hadamard:
        normed = rms_weight is not None
        y = _rotate(y, hadamard, x.dtype == jnp.bfloat16, normed) * hadamard**-0.5
    codes, scale = quantize(y * factor, dtype)
    return codes, scale, None if residual is None else total.astype(x.dtype)


def _rotate(y, block, from_bfloat16, normed):
    blocks = y.reshape(-1, block)
    if not from_bfloat16:
        return jnp.matmul(blocks, signs(block, y.dtype), precision="highest").reshape(y.shape)
    high = round_to(blocks, jnp.bfloat16)
    parts = [high, blocks - high] if normed else [high]
    h = signs(block, jnp.bfloat16)
    products = [
        jnp.matmul(part.astype(h.dtype), h, preferred_element_type=y.dtype) for part in parts
    ]
    return functools.reduce(jnp.add, products).reshape(y.shape)
