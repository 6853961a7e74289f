"""LQER. Zhang, Cheng, Constantinides, Zhao, ICML 2024, arXiv:2402.02446. Notes: papers/lqer.md.

Around any method that leaves an error E = W - Ŵ: with S = diag(s), s_j the mean |x_j| over
calibration activations,
    E S = U Σ Vᵀ,   A = U_k Σ_k,   B = V_kᵀ S⁻¹,   y = Ŵ x + A (B x)
is L²QER, and without S plain LQER, which looks at weights alone. A B = U_k U_kᵀ E: S need not be
inverted, and its unit does not matter.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, beside
from algorithms.low_rank import projection


class MagnitudeStats(NamedTuple):
    """Σ |x_j| over the activations seen."""

    total: Float[Array, " i"]


def lqer(*, rank: int = 32, scaled: bool = True) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Correct what a method loses by a product of rank `rank`; scaled: L²QER, which needs data."""
    projection.require_rank(rank)

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        if not scaled:
            return projection.corrected(method, lambda e, stats: projection.leading(e, rank))
        return projection.corrected(
            beside(method, init, observe),
            lambda e, stats: projection.leading(e * stats.own.total, rank),
        )

    return wrap


def init(i: int) -> MagnitudeStats:
    return MagnitudeStats(jnp.zeros(i))


def observe(stats: MagnitudeStats, x: Float[Array, "n i"]) -> MagnitudeStats:
    size = jnp.abs(x.astype(stats.total.dtype))
    return MagnitudeStats(stats.total + size.sum(0))
