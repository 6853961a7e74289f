"""OWL, outlier weighed layerwise sparsity. Yin, Wu, Zhang, Hsieh, Wang, Jia, Li, Jaiswal,
Pechenizkiy, Liang, Bendersky, Wang, Liu, ICML 2024, arXiv:2310.05175. Notes: papers/owl.md.

A block keeps more weights the more of them are outliers, by what Wanda says that they are worth:
    D_l = share of the block's A_ij = |W_ij| ‖X_j‖₂ above M · mean(A)
    S_l = S + mean(D') - D'_l,   D' = 2 λ (D - min D) / (max D - min D)
so that the sparsities span 2 λ and have the mean S.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from algorithms import channel_norms
from algorithms.channel_norms import NormStats
from algorithms.search.sparsities import SparsityMethod

LEAST = 0.01  # where a block would have no zero at all, as in the official code


def owl(*, threshold: float | int = 5.0, deviation: float | int = 0.08) -> SparsityMethod:
    """More weights for blocks with more outliers.

    threshold: M, of an outlier over the mean. deviation: λ, half of what sparsities span.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive.")
    if not 0 <= deviation < 0.5:
        raise ValueError(f"deviation={deviation} must be from 0 to below 0.5.")

    def measure(weights: Sequence[Float[Array, "..."]], stats: Sequence[NormStats]) -> Array:
        scores = [channel_norms.scores(*each) for each in zip(weights, stats, strict=True)]
        return outlier_ratio(scores, threshold)[None]

    def allocate(
        measures: Float[np.ndarray, "u 1"], sizes: Int[np.ndarray, " u"], sparsity: float | int
    ) -> Float[np.ndarray, " u"]:
        return sparsities(measures[:, 0], sizes, sparsity, deviation)

    return SparsityMethod("block", measure, allocate, channel_norms.init, channel_norms.observe)


def outlier_ratio(
    scores: Sequence[Float[Array, "..."]], threshold: float | int
) -> Float[Array, ""]:
    """D of one block."""
    count = sum(a.size for a in scores)
    mean = sum(jnp.sum(a) for a in scores) / count
    return jnp.stack([jnp.sum(a > threshold * mean) for a in scores]).sum() / count


def sparsities(
    ratios: Float[np.ndarray, " u"],
    sizes: Int[np.ndarray, " u"],
    sparsity: float | int,
    deviation: float | int,
) -> Float[np.ndarray, " u"]:
    """S_l; the same of all where all have as many outliers."""
    spread = ratios.max() - ratios.min()
    d = 2 * deviation * (ratios - ratios.min()) / spread if spread else np.zeros_like(ratios)
    found = sparsity + np.average(d, weights=sizes) - d
    if (found >= 1).any():
        raise ValueError(
            f"sparsity={sparsity} with deviation={deviation} leaves a block without weights: lower "
            "one of the two."
        )
    return np.where(found <= 0, LEAST, found)
