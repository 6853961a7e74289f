"""What fp8_block_matmul computes."""

import jax.numpy as jnp

from kernels.fp8_block_matmul.blocks import BLOCK, result_type


def fp8_block_matmul(x, w, x_scale, w_scale, *, out_dtype):
    wide = jnp.promote_types(x_scale.dtype, jnp.float32)
    (_, k), (n, _) = x.shape, w.shape
    x = x.astype(wide) * jnp.repeat(x_scale, BLOCK, 1)[:, :k]
    w = w.astype(wide) * jnp.repeat(jnp.repeat(w_scale, BLOCK, 0)[:n], BLOCK, 1)[:, :k]
    return jnp.matmul(x, w.T, precision="highest").astype(result_type(x_scale, out_dtype))
