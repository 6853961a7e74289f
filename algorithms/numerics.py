"""Small numerical conventions that several parts share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def relative_error(part: Float[Array, ""], total: Float[Array, ""]) -> Float[Array, ""]:
    """part / total, where nothing of nothing is no error: a layer of zeros is kept exactly."""
    return jnp.where((part == 0) & (total == 0), 0.0, part / total)
