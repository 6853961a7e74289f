"""Averages over the tokens that count.

A mask is boolean, or a weight for each token. A value that is masked out may be anything, NaN
included; its slopes may not.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Mask = Bool[Array, "*m"] | Float[Array, "*m"]


def masked_mean(values: Float[Array, "*m"], mask: Mask | None = None) -> Float[Array, ""]:
    """Σ mask · values / Σ mask; 0 where nothing counts."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(kept(values, mask)) / _at_least_something(jnp.sum(mask, dtype=values.dtype))


def mean_of_sequences(values: Float[Array, "*b T"], mask: Mask | None = None) -> Float[Array, ""]:
    """The mean over sequences of the mean over each one's tokens; one without is left out."""
    if mask is None:
        return jnp.mean(values)
    counts = jnp.sum(mask, -1, dtype=values.dtype)
    means = jnp.sum(kept(values, mask), -1) / _at_least_something(counts)
    return masked_mean(means, counts > 0)


def kept(values: Float[Array, "*m"], mask: Mask) -> Float[Array, "*m"]:
    """mask · values, and 0 where the mask is, whatever the value."""
    return jnp.where(mask != 0, values * mask, 0)


def _at_least_something(total: Float[Array, "*m"]) -> Float[Array, "*m"]:
    return jnp.where(total > 0, total, 1)


def seen_pairs(
    scores: Float[Array, "B a T T"], mask: Bool[Array, "B T"] | None, causal: bool
) -> Bool[Array, "B a T T"]:
    """Which pairs of tokens count: both of them do, and the second is not behind the first."""
    seen = jnp.ones(scores.shape, bool)
    if mask is not None:
        seen &= (mask[:, :, None] & mask[:, None, :])[:, None]
    return seen & jnp.tri(scores.shape[-1], dtype=bool) if causal else seen
