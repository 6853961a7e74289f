"""EoRA. Liu, Khadkevich, Fung, Sakr, Yang, Wang, Muralidharan, Yin, Cheng, Kautz, Wang, Molchanov,
Chen, 2024, arXiv:2410.21271. Notes: papers/eora.md.

Around any method that leaves an error E = W - Ŵ: with G = X Xᵀ = Q Λ Qᵀ and Q' = Q Λ^½,
    E Q' = U Σ Vᵀ,   A B = U_k Σ_k V_kᵀ Q'⁻¹ = U_k U_kᵀ E
so that ‖(E - A B) X‖² = Σ_{j>k} Σ_jj², the least that rank k can leave. Q' need not be inverted.
"""

from collections.abc import Callable

from jaxtyping import Array

from algorithms import hessian
from algorithms.layerwise import LayerwiseMethod, WithOwn, beside
from algorithms.low_rank import projection
from algorithms.low_rank.projection import leading_in_output


def eora(*, rank: int = 32) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Correct what a method loses by the product of rank `rank` that is best in the output."""
    projection.require_rank(rank)

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        if method.observe is hessian.observe:  # it has G already
            return projection.corrected(
                method, lambda e, stats: leading_in_output(e, stats.gram, rank)
            )
        paired = beside(method, hessian.init, hessian.observe)._replace(
            error=lambda w, approximation, stats: hessian.output_error(w, approximation, stats.own),
            notes=lambda stats: _notes(method, stats),
        )
        return projection.corrected(
            paired, lambda e, stats: leading_in_output(e, stats.own.gram, rank)
        )

    return wrap


def _notes(method: LayerwiseMethod, stats: WithOwn) -> dict[str, Array]:
    return hessian.notes(stats.own) | (method.notes(stats.inner) if method.notes else {})
