"""What hadamard computes."""

import jax.numpy as jnp

from kernels.hadamard.matrices import hadamard_matrix


def hadamard(x, inverse):
    wide, n = jnp.promote_types(x.dtype, jnp.float32), x.shape[-1]
    h = hadamard_matrix(n).T if inverse else hadamard_matrix(n)
    y = jnp.matmul(x.astype(wide), h.astype(wide), precision="highest") / jnp.sqrt(n).astype(wide)
    return y.astype(x.dtype)
