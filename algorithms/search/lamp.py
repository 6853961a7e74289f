"""LAMP, layer-adaptive magnitude-based pruning. Lee, Park, Mo, Ahn, Shin, ICLR 2021,
arXiv:2010.07611. Notes: papers/lamp.md.

A weight is worth its share of those of its layer that are at least as large; one threshold for all
layers says what goes. With a layer's weights in ascending order of size,
    score(u) = W_u² / Σ_{v >= u} W_v²
The largest weight of every layer has the score 1, so no layer goes whole.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms.search import global_threshold
from algorithms.search.sparsities import SparsityMethod


def lamp() -> SparsityMethod:
    """As sparse as each layer is where the lowest scores of the whole model go."""
    return SparsityMethod("layer", measure, global_threshold.below)


def measure(weights: Sequence[Float[Array, "..."]], stats: Sequence[None]) -> Array:
    """Counts of the scores; of experts, each is a layer."""
    matrices = [m for w in weights for m in w.reshape(-1, *w.shape[-2:])]
    return jnp.stack([global_threshold.counts(scores(m)) for m in matrices]).sum(0)


def scores(w: Float[Array, "o i"]) -> Float[Array, " n"]:
    """In ascending order, as W's sizes are."""
    squares = jnp.sort((w.astype(jnp.float32) ** 2).ravel())
    rest = lax.cumsum(squares, reverse=True)
    return jnp.where(rest > 0, squares / jnp.where(rest > 0, rest, 1.0), 0.0)
