"""Global magnitude pruning: one threshold for the whole model. Notes: papers/lamp.md, which names
who compares with it.

    S_l = share of the layer's |W_ij| below θ,   θ such that a fraction S of all weights is below it
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.search import global_threshold
from algorithms.search.sparsities import SparsityMethod


def global_magnitude() -> SparsityMethod:
    """As sparse as each layer is where the smallest weights of the whole model go."""
    return SparsityMethod("layer", measure, global_threshold.below)


def measure(weights: Sequence[Float[Array, "..."]], stats: Sequence[None]) -> Array:
    """Counts of |W|."""
    return jnp.stack([global_threshold.counts(jnp.abs(w)) for w in weights]).sum(0)
