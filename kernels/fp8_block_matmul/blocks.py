"""What the implementations share."""

import jax.numpy as jnp

BLOCK = 128  # numbers that share a scale: of a row of x, and a square of w


def result_type(x_scale, out_dtype):
    """out_dtype, unless the scales' type asks for more: float64 stays float64."""
    return x_scale.dtype if x_scale.dtype == jnp.float64 else out_dtype
