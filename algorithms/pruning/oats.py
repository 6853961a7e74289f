"""OATS. Zhang, Papyan, ICLR 2025, arXiv:2409.13652. Notes: papers/oats.md.

A weight as a sparse matrix and one of low rank, each input weighed by how large it is: with
D = diag(d), d_j = sqrt(mean x_j²), alternately
    L = what k singular vectors hold of (W - S) D
    S = the largest entries of each row of W D - L, or `keep` of each `block`
and both times D⁻¹. Of the parameters that stay, a fraction κ is L's:
    k = κ (1 - ρ) o i / (o + i),   (1 - κ) (1 - ρ) o i in S
Here both are kept without D, which is not inverted: L = U Uᵀ (W - S), with U of (W - S) D. U is
computed once; from one S to the next it is turned by orthogonal iterations.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from algorithms.layerwise import LayerwiseMethod
from algorithms.low_rank import projection
from algorithms.low_rank.ranks import Ratio
from algorithms.pruning import wanda
from algorithms.pruning.patterns import Pattern
from algorithms.pruning.wanda import NormStats
from algorithms.tensors import SumTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class OATSConfig:
    """What stays in S and in L, and how often they take turns."""

    pattern: Pattern
    ranks: Ratio
    iterations: int = 80
    orthogonal_iterations: int = 2
    dtype: str = "float16"

    def __post_init__(self) -> None:
        for name in ("iterations", "orthogonal_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")


def oats(
    *,
    sparsity: float = 0.5,
    keep: int | None = None,
    block: int | None = None,
    rank_ratio: float = 0.25,
    iterations: int = 80,
    orthogonal_iterations: int = 2,
    dtype: str = "float16",
) -> LayerwiseMethod:
    """Remove the fraction `sparsity` of a layer's parameters; or all but `keep` of each `block`,
    beside which a matrix of low rank stays.

    rank_ratio: of the parameters that stay, those of low rank. iterations: of S and L.
    orthogonal_iterations: of U, for each of them. dtype: what is stored of S and L. Raises
    ValueError for settings outside their ranges.
    """
    pattern, ranks = shares(sparsity, keep, block, rank_ratio)
    config = OATSConfig(
        pattern=pattern, ranks=ranks, iterations=iterations,
        orthogonal_iterations=orthogonal_iterations, dtype=dtype,
    )  # fmt: skip

    def compress(w: Float[Array, "o i"], stats: NormStats) -> SumTensor:
        return decompose(w, jnp.sqrt(stats.squares), config)

    return LayerwiseMethod(
        wanda.init, wanda.observe, compress, wanda.error, notes=wanda.notes, stacked=False
    )


def shares(
    sparsity: float, keep: int | None, block: int | None, rank_ratio: float
) -> tuple[Pattern, Ratio]:
    """What stays in S, and in L. Blocks say what S has, and L gets its share beside that."""
    if not 0 < rank_ratio < 1:
        raise ValueError(
            f"rank_ratio={rank_ratio} must be between 0 and 1: without a matrix of low rank take "
            "algorithm=wanda, without a sparse one algorithm=asvd."
        )
    asked = Pattern(sparsity=sparsity, keep=keep, block=block)
    density = 1 - asked.gone
    if asked.block is not None:
        density /= 1 - rank_ratio
    if density > 1:
        raise ValueError(
            f"keep={keep} of block={block} and rank_ratio={rank_ratio} are {density:.2f} times the "
            "parameters of a weight: keep fewer."
        )
    of_sparse = 1 - (1 - rank_ratio) * density
    return dataclasses.replace(asked, sparsity=of_sparse), Ratio(ratio=rank_ratio * density)


def decompose(w: Float[Array, "o i"], d: Float[Array, " i"], config: OATSConfig) -> SumTensor:
    """S + L; d counts up to a factor. Raises ValueError if no rank is left for L."""
    largest = d.max()
    d = d / jnp.where(largest > 0, largest, 1)
    there = (w != 0).any(1, keepdims=True)  # rows of zeros get no rounding errors

    def step(carry, _):
        u, s = carry
        left = w - u @ (u.T @ (w - s))
        s = jnp.where(chosen(left, d, config.pattern), left, 0)
        return (there * turned(u, (w - s) * d, config.orthogonal_iterations), s), None

    u = there * projection.leading(w * d, config.ranks.rank(w.shape))
    (u, s), _ = lax.scan(step, (u, jnp.zeros_like(w)), length=config.iterations - 1)
    low = projection.project(w - s, u, jnp.dtype(config.dtype))
    left = w - low.dequantize(w.dtype)  # of L as it is stored
    mask = chosen(left, d, config.pattern)
    return SumTensor(config.pattern.tensor(left, mask, rows=True, dtype=config.dtype), low)


def chosen(
    left: Float[Array, "o i"], d: Float[Array, " i"], pattern: Pattern
) -> Bool[Array, "o i"]:
    """Where S is, given what L leaves."""
    return pattern.of_rows(jnp.abs(left) * d)


def turned(u: Float[Array, "o r"], m: Float[Array, "o i"], count: int) -> Float[Array, "o r"]:
    """U after orthogonal iterations towards the leading left singular vectors of M.

    As S changes little from step to step, so do they, and what is missing after one step comes
    with the next.
    """
    for _ in range(count):
        u, _ = jnp.linalg.qr(m @ (m.T @ u))
    return u
