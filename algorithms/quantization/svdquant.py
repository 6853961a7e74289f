"""SVDQuant. Li, Lin, Zhang, Cai, Li, Guo, Xie, Meng, Zhu, Han, ICLR 2025, arXiv:2411.05007.
Notes: papers/svdquant.md.

Take the largest singular values out of W before it is quantized, so that its outliers go with them:
    W = U Σ Vᵀ,   A B = U_k Σ_k V_kᵀ in 16 bits,   R = W - A B
    y = Q(R) Q(x) + A (B x)
The branch sees x unrounded. Before it come smoothing scales, which move outliers from x into W:
the group `scaling`.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, Statistics
from algorithms.low_rank import projection
from algorithms.tensors.low_rank import SumTensor


def svdquant(*, rank: int = 32) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Leave to a method what a branch of rank `rank` does not hold of a weight."""
    projection.require_rank(rank)

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        def compress(w: Float[Array, "o i"], stats: Statistics, *key: Any) -> SumTensor:
            branch = projection.project(w, projection.leading(w, rank))
            residual = w - branch.dequantize(w.dtype)  # of the branch as it is stored
            return SumTensor(method.compress(residual, stats, *key), branch)

        return method._replace(compress=compress)

    return wrap
