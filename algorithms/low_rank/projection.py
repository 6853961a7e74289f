"""What low-rank methods share: leading directions, a projection.

Whatever norm a paper measures an error E [o, i] in, ‖E R‖ for some square R, the best correction of
rank k is U Uᵀ E with U [o, k] the leading left singular vectors of E R. (For the truncation
U Σ Vᵀ R⁻¹ that papers write, Σ Vᵀ = Uᵀ E R.) R is never inverted, and may be singular.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from algorithms.layerwise import LayerwiseMethod, Statistics
from algorithms.linalg import randomized_eigh
from algorithms.tensors.low_rank import LowRankTensor, SumTensor

MANY, FEW = 1024, 16  # directions from which on, and the part of them up to which, sketches pay

Basis = Callable[[Float[Array, "o i"], Statistics], Float[Array, "o r"]]


def leading(m: Float[Array, "o i"], rank: int) -> Float[Array, "o r"]:
    """An orthonormal basis of the `rank` leading left singular vectors of M, at most min(o, i).

    By the eigenvectors of M's smaller Gram matrix, four to nine times as fast here as a singular
    value decomposition. In float32 it does not tell apart values below 3e-4 of the largest, whose
    part of ‖M‖² is as small as rounding. Few of many are found by products alone.
    """
    o, i = m.shape
    if few_of_many(rank, min(o, i)):
        return _by_products(lambda v: m @ (m.T @ v), o, rank, m.dtype)
    if o <= i:
        return top_eigenvectors(m @ m.T, rank)
    q, _ = jnp.linalg.qr(m @ top_eigenvectors(m.T @ m, rank))
    return q


def top_eigenvectors(gram: Float[Array, "n n"], rank: int) -> Float[Array, "n r"]:
    """Those of the largest eigenvalues, the largest first."""
    _, vectors = jnp.linalg.eigh(gram)
    return vectors[:, ::-1][:, : min(rank, len(gram))]


def few_of_many(rank: int, n: int) -> bool:
    """Whether a randomized range finder is the faster way to `rank` of n directions. What it keeps
    of an error like rounding's, whose spectrum is flat, is less by a few thousandths
    (algorithms/README.md has both numbers).
    """
    return n >= MANY and FEW * rank <= n


def _by_products(
    product: Callable[[Float[Array, "n c"]], Float[Array, "n c"]],
    n: int,
    rank: int,
    dtype: DTypeLike,
) -> Float[Array, "n r"]:
    """The leading eigenvectors of what `product` multiplies by; the same ones each time."""
    return randomized_eigh(jax.random.key(0), product, n, rank, dtype=dtype)[1]


def leading_in_output(
    e: Float[Array, "o i"], gram: Float[Array, "i i"], rank: int
) -> Float[Array, "o r"]:
    """Those of E R for G = X Xᵀ = R Rᵀ: of what E does to the activations.

    Only their span counts, so where E has few rows E G Eᵀ serves, without R; so do its products
    where few of many directions are asked for.
    """
    if few_of_many(rank, min(e.shape)):
        return _by_products(lambda v: e @ (gram @ (e.T @ v)), len(e), rank, e.dtype)
    if e.shape[0] <= e.shape[1]:
        return top_eigenvectors(e @ gram @ e.T, rank)
    return leading(e @ root(gram), rank)


def root(gram: Float[Array, "i i"]) -> Float[Array, "i i"]:
    """Some R with R Rᵀ = G, which may be singular."""
    values, q = jnp.linalg.eigh(gram)
    return q * jnp.sqrt(jnp.maximum(values, 0))


def project(
    e: Float[Array, "o i"], u: Float[Array, "o r"], dtype: DTypeLike = jnp.float16
) -> LowRankTensor:
    """U Uᵀ E as factors in `dtype`."""
    a, b = factors(e, u)
    return LowRankTensor(a.astype(dtype), b.astype(dtype))


def factors(
    e: Float[Array, "o i"], u: Float[Array, "o r"]
) -> tuple[Float[Array, "o r"], Float[Array, "r i"]]:
    """U and Uᵀ E, each pair of a column and a row scaled to one magnitude."""
    # Rows without an error get no correction, not one of rounding errors.
    a, b = jnp.where((e == 0).all(1, keepdims=True), 0, u), u.T @ e
    size_a, size_b = jnp.abs(a).max(0), jnp.abs(b).max(1)
    balance = jnp.where((size_a == 0) | (size_b == 0), 1, jnp.sqrt(size_b / size_a))
    return a * balance, b / balance.reshape(-1, 1)


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
