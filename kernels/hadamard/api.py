"""The public function: checks shapes, chooses an implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from kernels import dispatch
from kernels.hadamard import matrices, reference, xla

IMPLEMENTATIONS = {"reference": reference.hadamard, "xla": xla.hadamard}


def hadamard(
    x: Shaped[Array, "*r n"], *, inverse: bool = False, implementation: str = "auto"
) -> Shaped[Array, "*r n"]:
    """x H / √n over the last axis, or x Hᵀ / √n, its inverse; H = `hadamard_matrix(n)`.

    Computed in float32 or x's wider type, then cast to x's. Linear, so it differentiates as it is.
    implementation: see `kernels.dispatch`. Raises ValueError for integers, for an n that has no
    matrix here, and for an implementation that cannot run.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x.dtype={x.dtype} must be a floating type: cast x first.")
    matrices.factor(x.shape[-1])  # or ValueError
    return dispatch.run("hadamard", IMPLEMENTATIONS, implementation, x, inverse)
