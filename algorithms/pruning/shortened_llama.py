"""Shortened LLaMA. Kim, Kim, Kim, Castells, Choi, Shin, Song, "Shortened LLaMA: Depth Pruning for
Large Language Models with Comparison of Retraining Methods", 2024, arXiv:2402.02834. Notes:
papers/shortgpt.md.

Two scores of a block, of which those with the lowest go. What the model loses without it:
    perplexity    exp of the mean loss on calibration text, the block left out
and what its weights W seem to be worth to the loss L, each by its first-order Taylor term:
    taylor        Σ_W Σ_ij | W_ij ∂L/∂W_ij |
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def taylor(weights: Iterable[Array], gradients: Iterable[Array]) -> Float[Array, ""]:
    """Of one block, norms' scales among its weights."""
    terms = [jnp.abs(w * g).sum() for w, g in zip(weights, gradients, strict=True)]
    return jnp.stack(terms).sum()


def perplexity(losses: Float[Array, "n"]) -> Float[Array, ""]:
    """Of the model without the block; losses: of the token that follows, in nats."""
    return jnp.exp(jnp.mean(losses))
