"""What wna16_matmul computes, step by step in float32 or x's wider type."""

import jax.numpy as jnp

from kernels.packing import unpack
from kernels.wna16_matmul.codes import decode


def wna16_matmul(x, packed, scale, zero, divisor, bits, kind):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    group_size = x.shape[-1] // scale.shape[-1]
    w = decode(unpack(packed, bits, x.shape[-1]), kind, wide)
    if kind == "int":
        zero = jnp.full(scale.shape, 2 ** (bits - 1)) if zero is None else zero
        w -= jnp.repeat(zero.astype(wide), group_size, -1)
    scale = scale.astype(wide) if divisor is None else scale.astype(wide) / divisor.astype(wide)
    w *= jnp.repeat(scale, group_size, -1)
    return jnp.matmul(x.astype(wide), w.T, precision="highest").astype(x.dtype)
