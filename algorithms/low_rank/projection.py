"""What low-rank methods share: leading directions, a projection.

Whatever norm a paper measures an error E [o, i] in, ‖E R‖ for some square R, the best correction of
rank k is U Uᵀ E with U [o, k] the leading left singular vectors of E R. (For the truncation
U Σ Vᵀ R⁻¹ that papers write, Σ Vᵀ = Uᵀ E R.) R is never inverted, and may be singular.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, Statistics
from algorithms.tensors.low_rank import LowRankTensor, SumTensor

Basis = Callable[[Float[Array, "o i"], Statistics], Float[Array, "o r"]]


def leading(m: Float[Array, "o i"], rank: int) -> Float[Array, "o r"]:
    """An orthonormal basis of the `rank` leading left singular vectors of M, at most min(o, i).

    By the eigenvectors of M's smaller Gram matrix, four to nine times as fast here as a singular
    value decomposition. In float32 it does not tell apart values below 3e-4 of the largest, whose
    part of ‖M‖² is as small as rounding.
    """
    o, i = m.shape
    if o <= i:
        return top_eigenvectors(m @ m.T, rank)
    q, _ = jnp.linalg.qr(m @ top_eigenvectors(m.T @ m, rank))
    return q


def top_eigenvectors(gram: Float[Array, "n n"], rank: int) -> Float[Array, "n r"]:
    """Those of the largest eigenvalues, the largest first."""
    _, vectors = jnp.linalg.eigh(gram)
    return vectors[:, ::-1][:, : min(rank, len(gram))]


def project(e: Float[Array, "o i"], u: Float[Array, "o r"]) -> LowRankTensor:
    """U Uᵀ E as factors in float16, each pair of a column and a row scaled to one magnitude."""
    # Rows without an error get no correction, not one of rounding errors.
    a, b = jnp.where((e == 0).all(1, keepdims=True), 0, u), u.T @ e
    size_a, size_b = jnp.abs(a).max(0), jnp.abs(b).max(1)
    balance = jnp.where((size_a == 0) | (size_b == 0), 1, jnp.sqrt(size_b / size_a))
    a, b = a * balance, b / balance.reshape(-1, 1)
    return LowRankTensor(a.astype(jnp.float16), b.astype(jnp.float16))


def require_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank} must be positive: without a correction, leave it out.")


def corrected(method: LayerwiseMethod, basis: Basis) -> LayerwiseMethod:
    """The method, with what it loses projected on `basis(E, statistics)` and added."""

    def compress(w: Float[Array, "o i"], stats: Statistics, *key: Any) -> SumTensor:
        base = method.compress(w, stats, *key)
        e = w - base.dequantize(w.dtype)
        return SumTensor(base, project(e, basis(e, stats)))

    return method._replace(compress=compress)
