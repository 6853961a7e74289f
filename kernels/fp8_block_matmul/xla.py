"""Products of blocks, then scales, for few rows; for more, scales, then one product in bfloat16.

The first keeps w in float8 to the tensor cores, and holds M·N·K/128 partial sums in float32, which
it writes and reads; the second writes and reads w in bfloat16. Those bytes are equal at M = 64. A
number of float8 is exact in bfloat16, so the first rounds nothing; the second rounds each scaled
number to 8 bits. XLA has no form that applies scales between steps of a product.
"""

import jax.numpy as jnp

from kernels.fp8_block_matmul.blocks import BLOCK, result_type

FEW = 64


def fp8_block_matmul(x, w, x_scale, w_scale, *, out_dtype):
    form = _products_first if x.shape[0] < FEW else _scales_first
    return form(x, w, x_scale, w_scale).astype(result_type(x_scale, out_dtype))


def _products_first(x, w, x_scale, w_scale):
    (m, k), (n, _) = x.shape, w.shape
    x = jnp.pad(x, ((0, 0), (0, -k % BLOCK))).reshape(m, -1, BLOCK)
    w = jnp.pad(w, ((0, -n % BLOCK), (0, -k % BLOCK))).reshape(-1, x.shape[1], BLOCK)
    y = jnp.einsum(
        "mgk,ngk->gmn",
        x.astype(jnp.bfloat16),
        w.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    scale = x_scale.T[:, :, None, None] * w_scale.T[:, None, :, None]
    y = (y.reshape(*scale.shape[:3], BLOCK) * scale).sum(0)
    return y.reshape(m, -1)[:, :n]


def _scales_first(x, w, x_scale, w_scale):
    (_, k), (n, _) = x.shape, w.shape
    x = x.astype(jnp.float32) * jnp.repeat(x_scale, BLOCK, 1)[:, :k]
    w = w.astype(jnp.float32) * jnp.repeat(jnp.repeat(w_scale, BLOCK, 0)[:n], BLOCK, 1)[:, :k]
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jnp.matmul(x, w.T, preferred_element_type=jnp.float32)
