"""The truncated singular value decomposition of a weight. Eckart, Young, Psychometrika 1936.
Notes: papers/svd.md.

    W = U Σ Vᵀ,   A B = U_k Σ_k V_kᵀ = U_k U_kᵀ W
is the nearest matrix of rank k: ‖W - A B‖² = Σ_{j>k} Σ_jj². It looks at no activations, and is what
every other choice of A and B is compared with.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod
from algorithms.low_rank import projection
from algorithms.low_rank.ranks import Ratio
from algorithms.tensors import LowRankTensor


def svd(*, ratio: float = 0.8, rank_multiple: int = 1, dtype: str = "float16") -> LayerwiseMethod:
    """Keep the largest singular values, so many that factors have `ratio` of the parameters.

    rank_multiple: what the rank is rounded down to. dtype: of the factors, as stored.
    """
    ranks = Ratio(ratio=ratio, rank_multiple=rank_multiple)

    def compress(w: Float[Array, "o i"], stats: None) -> LowRankTensor:
        u = projection.leading(w, ranks.rank(w.shape))
        return projection.project(w, u, jnp.dtype(dtype))

    return LayerwiseMethod(None, None, compress, stacked=False)
