"""SVD-LLM. Wang, Zheng, Wan, Zhang, ICLR 2025, arXiv:2403.07378. Notes: papers/svd_llm.md.

Truncation in the norm of the output. With G = X Xᵀ = S Sᵀ,
    W S = U Σ Vᵀ,   A = U_k,   B = Σ_k V_kᵀ S⁻¹ = U_kᵀ W
    ‖(W - A B) X‖² = Σ_{j>k} Σ_jj²
which no other matrix of rank k is below. S is not inverted, so that G may be singular. Then A is
fitted to B as it is stored, B̂: with C = B̂ G B̂ᵀ, by least squares (the paper's first version),
    A <- A + (W - A B̂) G B̂ᵀ (C + δ I)⁻¹
which minimises ‖(W - A' B̂) X‖² + δ ‖A' - A‖², so that the output error does not grow; δ is as small
as C's rounding. With B̂ = B there is nothing to gain: (W - A B) G Bᵀ = 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float

from algorithms import hessian
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod
from algorithms.low_rank import projection
from algorithms.low_rank.ranks import Ratio
from algorithms.tensors import CompressedTensor, LowRankTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVDLLMConfig:
    """How many ranks stay, in which norm they are chosen, and how factors are kept."""

    ranks: Ratio = Ratio()
    whitening: bool = True  # ranks in the norm of the output; false: in that of the weight
    update: bool = True  # A, by least squares
    factors: LayerwiseMethod | None = None  # what compresses them; None: numbers, as `dtype`
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if not (self.whitening or self.update):
            raise ValueError(
                "whitening=False with update=False looks at no activations: take algorithm=svd."
            )
        if self.factors is not None:
            require_factors(self.factors)


def svd_llm(
    *,
    ratio: float = 0.8,
    whitening: bool = True,
    update: bool = True,
    rank_multiple: int = 1,
    factors: LayerwiseMethod | None = None,
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Keep what does most in the output, in two factors with `ratio` of the parameters.

    whitening: ranks are chosen in the norm of the output, else in that of the weight. update: A is
    fitted to B as it is stored. rank_multiple: what the rank is rounded down to. factors: a method
    that compresses A and B as layers of their own, B for x and A for B x. dtype: of the factors
    without one. Raises ValueError for settings outside their ranges.
    """
    config = SVDLLMConfig(
        ranks=Ratio(ratio=ratio, rank_multiple=rank_multiple), whitening=whitening,
        update=update, factors=factors, dtype=dtype,
    )  # fmt: skip

    def compress(w: Float[Array, "o i"], stats: HessianStats, *key: Any) -> LowRankTensor:
        return factorize(w, stats.gram, config, *key)

    seeded = factors is not None and factors.seeded
    return hessian.method(compress, stacked=False, seeded=seeded)


def factorize(
    w: Float[Array, "o i"], gram: Float[Array, "i i"], config: SVDLLMConfig, key: Any = None
) -> LowRankTensor:
    """A and B of a weight, given X Xᵀ; key: for factors compressed by a method that draws."""
    rank = config.ranks.rank(w.shape)
    directions = (
        projection.leading_in_output(w, gram, rank)
        if config.whitening
        else projection.leading(w, rank)
    )
    a, b = projection.factors(w, directions)
    keys = (None, None) if key is None else jax.random.split(key)
    stored_b, b = _stored(b, gram, config, keys[0])
    if config.update:
        a = fitted(w, a, b, gram)
    return LowRankTensor(_stored(a, b @ gram @ b.T, config, keys[1])[0], stored_b)


def fitted(
    w: Float[Array, "o i"],
    a: Float[Array, "o r"],
    b: Float[Array, "r i"],
    gram: Float[Array, "i i"],
) -> Float[Array, "o r"]:
    """The A' that is best for B in the output; where B x is next to nothing, A."""
    c = b @ gram @ b.T
    rounding = jnp.finfo(c.dtype).eps * len(c) * jnp.diag(c).max()
    ridge = jnp.where(rounding > 0, rounding, 1) * jnp.eye(len(c), dtype=c.dtype)
    lost = (w - a @ b) @ gram @ b.T
    return a + cho_solve(cho_factor(c + ridge), lost.T).T


def truncation_losses(w: Float[Array, "o i"], gram: Float[Array, "i i"]) -> Float[Array, " ranks"]:
    """Σ_{j>k} Σ_jj² for k = 0 … min(o, i): what ‖(W - Ŵ) X‖² is for the best Ŵ of each rank k.

    What a rank is worth to a layer, in the unit of its output, so that ranks can be shared out
    among layers. In float32 it is exact to about 1e-7 of the first.
    """
    if w.shape[0] <= w.shape[1]:
        small = w @ gram @ w.T
    else:
        m = w @ projection.root(gram)
        small = m.T @ m
    values = jnp.maximum(jnp.linalg.eigvalsh(small), 0)  # Σ², the least first
    return jnp.append(0, jnp.cumsum(values))[::-1]


def require_factors(method: Any) -> None:
    """Raise ValueError unless a method can compress factors, of which only G is known."""
    if not isinstance(method, LayerwiseMethod) or method.observe not in (None, hessian.observe):
        raise ValueError(
            "factors are compressed by a method of single layers that looks at X Xᵀ or at weights "
            "alone: choose rtn, gptq or hqq."
        )


def _stored(
    factor: Float[Array, "r c"], gram: Float[Array, "c c"], config: SVDLLMConfig, key: Any
) -> tuple[Array | CompressedTensor, Array]:
    """A factor as it is kept, and what it stands for then."""
    method = config.factors
    if method is None:
        kept = factor.astype(config.dtype)
        return kept, kept.astype(factor.dtype)
    drawn = (key,) if method.seeded else ()
    stats = None if method.observe is None else HessianStats(gram)
    try:
        tensor = method.compress(factor, stats, *drawn)
    except ValueError as error:
        raise ValueError(
            f"{error} That is a factor of rank {min(factor.shape)}, which rank_multiple makes a "
            "multiple of a group's size."
        ) from error
    return tensor, tensor.dequantize(factor.dtype)
