"""What gram computes."""

import jax.numpy as jnp


def gram(x):
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.matmul(x.T, x, precision="highest")
