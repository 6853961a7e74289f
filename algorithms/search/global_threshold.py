"""One threshold for the scores of all layers: how many of each layer's lie below it.

Scores are kept as counts by their leading bits, 32 bins for each power of two, so that a model of
any size is one vector for each layer. Within the bin of the threshold every layer loses the same
share, by which the total is met exactly.
"""

import functools
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Real

SHIFT = 18  # bits of a float32 that a bin does not tell apart
BINS = 1 << 31 - SHIFT


def counts(scores: Float[Array, "*n"]) -> Int[Array, " m"]:
    """How many scores, which are not negative, each bin has."""
    raw = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.uint32)
    return jnp.bincount((raw >> SHIFT).ravel().astype(jnp.int32), length=BINS)


def total(layers: Iterable[Float[Array, "..."]]) -> Int[Array, " m"]:
    """Counts of several matrices together."""
    return functools.reduce(jnp.add, map(counts, layers))


def below(
    counts: Real[np.ndarray, "u m"], sizes: Int[np.ndarray, " u"], sparsity: float | int
) -> Float[np.ndarray, " u"]:
    """The share of each unit's scores below the threshold that `sparsity` of all are below."""
    cumulative = np.cumsum(counts.sum(0))
    wanted = sparsity * cumulative[-1]
    bin_ = int(np.searchsorted(cumulative, wanted))
    before = cumulative[bin_ - 1] if bin_ else 0.0
    share = (wanted - before) / max(cumulative[bin_] - before, 1.0)
    return (counts[:, :bin_].sum(1) + share * counts[:, bin_]) / sizes
