"""What wna16_matmul computes, step by step in float32."""

import jax.numpy as jnp

from kernels.packing import unpack


def wna16_matmul(x, packed, scale, zero, *, bits):
    codes = unpack(packed, bits, x.shape[-1]).astype(jnp.float32)
    group_size = x.shape[-1] // scale.shape[-1]
    zero = jnp.full(scale.shape, 2 ** (bits - 1)) if zero is None else zero
    w = jnp.repeat(scale.astype(jnp.float32), group_size, -1) * (
        codes - jnp.repeat(zero.astype(jnp.float32), group_size, -1)
    )
    return (x.astype(jnp.float32) @ w.T).astype(x.dtype)
