"""ASVD. Yuan, Shang, Song, Yang, Wu, Yan, Sun, 2023, arXiv:2312.05821. Notes: papers/asvd.md.

Large activations are taken into the weight before it is truncated, and out of it again: with
S = diag(s), s_j = (mean |x_j|)^α over calibration activations,
    W S = U Σ Vᵀ,   A B = U_k Σ_k V_kᵀ S⁻¹ = U_k U_kᵀ W
S need not be inverted, and its unit does not matter. α = 0 is the truncated SVD.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod
from algorithms.low_rank import lqer, projection
from algorithms.low_rank.lqer import MagnitudeStats
from algorithms.low_rank.ranks import Ratio
from algorithms.numerics import relative_error
from algorithms.tensors import LowRankTensor


def asvd(
    *, ratio: float = 0.8, alpha: float | int = 0.5, rank_multiple: int = 1, dtype: str = "float16"
) -> LayerwiseMethod:
    """Truncate with each input weighed by how large it is, to the power `alpha`.

    ratio: of the parameters, what factors have. rank_multiple: what the rank is rounded down to.
    dtype: of the factors, as stored.
    """
    ranks = Ratio(ratio=ratio, rank_multiple=rank_multiple)
    if alpha < 0:
        raise ValueError(f"alpha={alpha} must not be negative; 0 is algorithm=svd.")

    def compress(w: Float[Array, "o i"], stats: MagnitudeStats) -> LowRankTensor:
        u = projection.leading(w * scale(stats, alpha), ranks.rank(w.shape))
        return projection.project(w, u, jnp.dtype(dtype))

    def error(w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats) -> Array:
        """‖(W - Ŵ) S‖² / ‖W S‖²."""
        s = scale(stats, alpha)
        return relative_error(jnp.sum(((w - approximation) * s) ** 2), jnp.sum((w * s) ** 2))

    return LayerwiseMethod(lqer.init, lqer.observe, compress, error, notes=notes, stacked=False)


def scale(stats: MagnitudeStats, alpha: float | int) -> Float[Array, " i"]:
    """s, of mean 1."""
    s = stats.total**alpha
    return s / jnp.where(s.any(), s.mean(), 1)


def notes(stats: MagnitudeStats) -> dict[str, Array]:
    """What a record keeps of a site: how many of its inputs are dead."""
    return {"dead_inputs": (stats.total == 0).sum()}
