"""What quantize_rows computes."""

import jax.numpy as jnp
from jax import lax

from kernels.quantize_rows.rotation import signs
from kernels.quantize_rows.rounding import add, quantize


def quantize_rows(x, residual, rms_weight, *, rms_epsilon, hadamard, dtype):
    y = total = add(x, residual)
    if rms_weight is not None:
        mean_square = jnp.mean(y**2, -1, keepdims=True)
        y = y * lax.rsqrt(mean_square + rms_epsilon) * rms_weight.astype(y.dtype)
    if hadamard:
        h = signs(hadamard, y.dtype) * hadamard**-0.5
        blocks = y.reshape(*y.shape[:-1], -1, hadamard)
        y = jnp.einsum("mbh,hg->mbg", blocks, h, precision="highest").reshape(y.shape)
    codes, scale = quantize(y, dtype)
    return codes, scale, None if residual is None else total.astype(x.dtype)
