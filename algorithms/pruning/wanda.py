"""Wanda. Sun, Liu, Bair, Kolter, ICLR 2024, arXiv:2306.11695. Notes: papers/wanda.md.

What a weight is worth is its size times that of what it multiplies (Eq. 1), compared within each
row, which is an output; those that stay are not changed:
    S_ij = |W_ij| ‖X_j‖₂
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.channel_norms import NormStats, init, observe, scores
from algorithms.layerwise import LayerwiseMethod
from algorithms.numerics import relative_error
from algorithms.pruning.patterns import Pattern
from algorithms.tensors import CompressedTensor


def wanda(
    *,
    sparsity: float = 0.5,
    keep: int | None = None,
    block: int | None = None,
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Keep what multiplies much: all but the fraction `sparsity` of a row, or `keep` of each
    `block`.

    dtype: what is stored of the weights that stay. Raises ValueError for what is no pattern.
    """
    pattern = Pattern(sparsity=sparsity, keep=keep, block=block)

    def compress(w: Float[Array, "o i"], stats: NormStats) -> CompressedTensor:
        mask = pattern.of_rows(scores(w, stats))
        return pattern.tensor(w, mask, rows=True, dtype=dtype)

    return LayerwiseMethod(init, observe, compress, error, notes=notes)


def error(
    w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: NormStats
) -> Float[Array, ""]:
    """Σ (w - ŵ)² ‖X_j‖² / Σ w² ‖X_j‖²: the output error, were channels uncorrelated."""
    lost = jnp.sum((w - approximation) ** 2 * stats.squares)
    return relative_error(lost, jnp.sum(w**2 * stats.squares))


def notes(stats: NormStats) -> dict[str, Array]:
    """What a record keeps of a site: how many of its inputs are dead."""
    return {"dead_inputs": (stats.squares == 0).sum()}
