"""How large the channels of a site are, and what weights are worth by it: |W_ij| ‖X_j‖₂."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class NormStats(NamedTuple):
    """‖X_j‖² over the activations seen."""

    squares: Float[Array, "*e i"]


def init(i: int) -> NormStats:
    return NormStats(jnp.zeros(i))


def observe(stats: NormStats, x: Float[Array, "n i"]) -> NormStats:
    return NormStats(stats.squares + jnp.sum(x.astype(stats.squares.dtype) ** 2, 0))


def scores(w: Float[Array, "*e o i"], stats: NormStats) -> Float[Array, "*e o i"]:
    """S_ij = |W_ij| ‖X_j‖₂, of every expert by its own norms."""
    return jnp.abs(w) * jnp.sqrt(stats.squares)[..., None, :]
