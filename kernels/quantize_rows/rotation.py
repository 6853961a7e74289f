"""The ±1 matrix as a constant of the traced program.

Not `kernels.hadamard.hadamard_matrix`: that computes on the default device, which is not allowed
while a program is compiled for a GPU that is not there. A test holds both equal.
"""

import functools

import jax
import jax.numpy as jnp


def signs(n: int, dtype) -> jax.Array:
    """Sylvester's matrix of order n, a power of two."""
    return jnp.asarray(_rows(n), dtype)


@functools.cache
def _rows(n: int) -> list[list[int]]:
    return [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
