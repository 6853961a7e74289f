"""Leading singular triples of a matrix, or eigenvectors of one that is known by its products, by a
randomized range finder; and principal components.

Halko, Martinsson, Tropp, SIAM Review 2011, arXiv:0909.4061. For M [m, n], a rank k and p columns
more, with Ω [n, k + p] of standard normal numbers:
    Q = orth(M Ω),   then q times   Q <- orth(M orth(Mᵀ Q)),   B = Qᵀ M = Û S Vᵀ,   U = Q Û.
Each of the q power iterations raises the singular values, as Q sees them, to two powers more; a QR
factorization after every product keeps the small ones from drowning (their Algorithm 4.4). What is
lost, ‖M - Q Qᵀ M‖, comes near σ_{k+1}, the least that any Q of k columns can lose. Where k + p
reaches min(m, n) nothing is lost.

A factorization takes O(m n (k + p)) operations in place of O(m n min(m, n)).

A positive semidefinite A [n, n] is its own power iteration (their Section 5.3):
    Q = orth(Ω),   then q times   Q <- orth(A Q),   Qᵀ A Q = V Λ Vᵀ,   U = Q V.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from algorithms.numerics import widened


class PrincipalComponents(NamedTuple):
    """Of points x: (x - mean) · components are k uncorrelated coordinates with these variances."""

    mean: Float[Array, "*batch d"]
    components: Float[Array, "*batch k d"]  # orthonormal rows, by falling variance
    variances: Float[Array, "*batch k"]  # over n - 1
    total: Float[Array, "*batch"]  # the variance of all d coordinates together


@functools.partial(jax.jit, static_argnames=("rank", "oversampling", "iterations"))
def randomized_svd(
    key: Key[Array, ""],
    m: Float[Array, "*batch m n"],
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 2,
) -> tuple[Float[Array, "*batch m k"], Float[Array, "*batch k"], Float[Array, "*batch k n"]]:
    """(U, s, Vᵀ) of the `rank` largest singular values of each matrix, the largest first.

    oversampling: p, columns of Ω beyond the rank. iterations: q; each costs two products with M,
    and pays where singular values fall slowly. Computed in float32 or M's wider type.

    Differentiable as it is computed, where M has rank k + p at least and the singular values are
    distinct; those of a matrix of lower rank have gradients that are not numbers.

    Raises ValueError for a rank, oversampling or iterations that mean nothing.
    """
    m = widened(m)
    columns = _columns(m.shape, rank, oversampling, iterations)
    sketch = jax.random.normal(key, (*m.shape[:-2], m.shape[-1], columns), m.dtype)

    def power(q: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _orthonormal(m @ _orthonormal(m.mT @ q)), None

    q, _ = lax.scan(power, _orthonormal(m @ sketch), length=iterations)
    u, s, v_t = jnp.linalg.svd(q.mT @ m, full_matrices=False)
    return q @ u[..., :rank], s[..., :rank], v_t[..., :rank, :]


def randomized_eigh(
    key: Key[Array, ""],
    product: Callable[[Float[Array, "n c"]], Float[Array, "n c"]],
    size: int,
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 4,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, " k"], Float[Array, "n k"]]:
    """(λ, U) of the `rank` largest eigenvalues of a positive semidefinite A [n, n], the largest
    first.

    product: V -> A V for blocks of columns, such as v -> m @ (m.T @ v) for the left singular
    vectors of M, whose Gram matrix is never formed. size: n. oversampling: p, columns of Ω beyond
    the rank. iterations: q; each costs a product. dtype: of the columns.

    Raises ValueError for a rank, oversampling or iterations that mean nothing.
    """
    columns = _columns((size, size), rank, oversampling, iterations)

    def power(q: jax.Array, _: None) -> tuple[jax.Array, None]:
        return _orthonormal(product(q)), None

    sketch = _orthonormal(jax.random.normal(key, (size, columns), dtype))
    q, _ = lax.scan(power, sketch, length=iterations)
    values, vectors = jnp.linalg.eigh(q.T @ product(q))
    return values[::-1][:rank], (q @ vectors[:, ::-1])[:, :rank]


@functools.partial(jax.jit, static_argnames=("rank", "oversampling", "iterations"))
def pca(
    key: Key[Array, ""],
    x: Float[Array, "*batch n d"],
    rank: int,
    *,
    oversampling: int = 10,
    iterations: int = 2,
) -> PrincipalComponents:
    """The `rank` directions of largest variance of n points, by `randomized_svd` of x - mean.

    The entry of largest magnitude of each component is positive, which settles its sign. Raises
    ValueError for fewer than two points, and for what `randomized_svd` refuses.
    """
    x = widened(x)
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"x must have at least two points to vary, {x.shape=}.")
    mean = x.mean(-2)
    centred = x - mean[..., None, :]
    _, s, v_t = randomized_svd(key, centred, rank, oversampling=oversampling, iterations=iterations)
    largest = jnp.take_along_axis(v_t, jnp.argmax(jnp.abs(v_t), -1)[..., None], -1)
    total = jnp.sum(centred**2, (-2, -1)) / (n - 1)
    return PrincipalComponents(mean, v_t * jnp.sign(largest), s**2 / (n - 1), total)


def _columns(shape: tuple[int, ...], rank: int, oversampling: int, iterations: int) -> int:
    """k + p, no more than the matrix has rows or columns."""
    least = min(shape[-2:])
    if not 1 <= rank <= least:
        raise ValueError(f"rank={rank} must be from 1 to min(m, n)={least} of a matrix {shape}.")
    if oversampling < 0 or iterations < 0:
        raise ValueError(f"oversampling={oversampling} and {iterations=} must not be negative.")
    return min(rank + oversampling, least)


def _orthonormal(x: jax.Array) -> jax.Array:
    return jnp.linalg.qr(x)[0]
