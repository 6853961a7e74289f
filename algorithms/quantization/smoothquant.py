"""SmoothQuant. Xiao, Lin, Seznec, Wu, Demouth, Han, ICML 2023, arXiv:2211.10438.
Notes: papers/smoothquant.md.

Activations have channels far larger than the rest, which a scale per token has to cover; weights
have none. Part of the range moves from x to W, channel by channel (equation 4):
    s_j = max|x_j|^α / max|w_j|^(1-α),   y = (x / s) (W s)ᵀ
At α = 1/2 both ranges become √(max|x_j| max|w_j|).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import SiteTransform

LEAST = 1e-5  # of max|w_j|, and of s_j, as in the official code


class PeakStats(NamedTuple):
    """max |x| of each channel over the activations seen."""

    peak: Float[Array, " i"]


def smoothquant(*, strength: float = 0.5) -> SiteTransform:
    """strength: α, the share of an outlier's range that moves from activations into weights.

    Raises ValueError for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength={strength} must be from 0 (all of the range stays in the activations) to 1 "
            "(all of it moves into the weights)."
        )

    def scale(w: Float[Array, "o i"], stats: PeakStats) -> Float[Array, " i"]:
        return smoothing_scale(w, stats.peak, strength)

    return SiteTransform(init, observe, scale)


def init(i: int) -> PeakStats:
    return PeakStats(jnp.zeros(i))


def observe(stats: PeakStats, x: Float[Array, "n i"]) -> PeakStats:
    return PeakStats(jnp.maximum(stats.peak, jnp.abs(x).max(0).astype(stats.peak.dtype)))


def smoothing_scale(
    w: Float[Array, "o i"], peak: Float[Array, " i"], strength: float
) -> Float[Array, " i"]:
    """s for the stacked weights of a site's readers; 1 for an input that is always zero."""
    weight_peak = jnp.maximum(jnp.abs(w).max(0), LEAST)
    s = jnp.maximum(peak**strength / weight_peak ** (1 - strength), LEAST)
    return jnp.where(peak == 0, 1.0, s)
