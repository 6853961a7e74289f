"""AWQ. Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, MLSys 2024, arXiv:2306.00978.
Notes: papers/awq.md.

A few input channels carry most of the activation: their weights should be rounded more finely. For
a layer y = W x, channel j of W is multiplied by s_j before rounding and x_j divided by it:
    s(α)_j = m_j^α / √(max_k m_k^α · min_k m_k^α),   m = mean |x| over calibration activations
    α* = argmin over α = 0, 1/n, …, (n-1)/n of tr(ΔW G ΔWᵀ),   ΔW = W - Q(W s) / s,   G = X Xᵀ
α = 0 is plain rounding. The channels move into what comes before the layer: it computes as before.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms import hessian
from algorithms.formats import Format
from algorithms.hessian import HessianStats
from algorithms.layerwise import SiteTransform

LEAST = 1e-4  # of m^α before it is centred, as in the official code


class AWQStats(NamedTuple):
    """What the search looks at: G, and the sums that make mean |x|."""

    hessian: HessianStats
    magnitude: Float[Array, " i"]  # Σ |x|
    tokens: Float[Array, ""]


def awq(*, format: Format | None = None, grid: int = 20) -> SiteTransform:
    """Scales that make rounding onto `format` cost least; grid: how many exponents α are tried.

    The search rounds onto the whole range of each group, whatever `format.search` says: clipping
    comes after scaling, in the algorithm that rounds (papers/awq.md). Raises ValueError without a
    format to round onto.
    """
    if format is None:
        raise ValueError(
            "format=null leaves nothing to choose scales for: take an algorithm with a format, or "
            "give scaling.format one."
        )
    if grid < 1:
        raise ValueError(f"grid={grid} must be at least 1, the number of exponents to try.")
    whole_range = dataclasses.replace(format, search=None)

    def scale(w: Float[Array, "o i"], stats: AWQStats) -> Float[Array, " i"]:
        return search_scale(w, stats, whole_range, grid)

    return SiteTransform(init, observe, scale)


def init(i: int) -> AWQStats:
    return AWQStats(hessian.init(i), jnp.zeros(i), jnp.zeros(()))


def observe(stats: AWQStats, x: Float[Array, "n i"]) -> AWQStats:
    magnitude = stats.magnitude + jnp.abs(x).sum(0).astype(stats.magnitude.dtype)
    return AWQStats(hessian.observe(stats.hessian, x), magnitude, stats.tokens + x.shape[0])


def search_scale(
    w: Float[Array, "o i"], stats: AWQStats, format: Format, grid: int
) -> Float[Array, " i"]:
    """s of the exponent with the least output error; NaN if no error is finite."""
    mean = stats.magnitude / jnp.maximum(stats.tokens, 1)
    exponents = jnp.arange(grid, dtype=w.dtype) / grid

    def error(exponent: Float[Array, ""]) -> Float[Array, ""]:
        s = channel_scale(mean, exponent)[None]
        d = w - format.nearest(w * s) / s
        return jnp.sum(d @ stats.hessian.gram * d)

    errors = lax.map(error, exponents)  # one after the other: each needs a copy of W
    errors = jnp.where(jnp.isnan(errors), jnp.inf, errors)
    best = jnp.argmin(errors)  # the first of equals, as there
    return jnp.where(jnp.isfinite(errors[best]), channel_scale(mean, exponents[best]), jnp.nan)


def channel_scale(mean: Float[Array, " i"], exponent: Float[Array, ""]) -> Float[Array, " i"]:
    """mean^α, centred so that the largest and the smallest are each other's inverse.

    A dead input, whose mean is 0, has scale 1 and no say in where the centre lies.
    """
    dead = mean == 0
    s = jnp.maximum(jnp.where(dead, mean.max(), mean) ** exponent, LEAST)
    return jnp.where(dead, 1.0, s / jnp.sqrt(s.max() * s.min()))
