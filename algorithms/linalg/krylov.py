"""Lanczos' iteration with full reorthogonalization: what a few products with A say of its spectrum.

Lanczos, Journal of Research of the National Bureau of Standards 1950. For a symmetric A, known by
its products alone, and a start q_1 of norm 1:
    A Q = Q T + β_k q_{k+1} e_kᵀ,   Qᵀ Q = I,   T tridiagonal: α_j on, β_j beside its diagonal.
The outer eigenvalues of T converge to A's first. With T = S Θ Sᵀ,
    ‖A y_i - θ_i y_i‖ = β_k |S_ki|,   y_i = Q S_:i,   so near to θ_i is an eigenvalue of A
    q_1ᵀ f(A) q_1 ≈ Σ_i S_1i² f(θ_i),   exact for polynomials up to degree 2k - 1 (Gauss' rule)
In floating point Q loses orthogonality as soon as an eigenvalue converges, and finds it again and
again: each new vector is therefore made orthogonal to all before, twice (Parlett's "twice is
enough"), and Q is kept: k times the size of a vector.

Conjugate gradients are `jax.scipy.sparse.linalg.cg`: they take pytrees and a preconditioner, and
are differentiated implicitly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from algorithms.numerics import widened

type MatVec = Callable[[Any], Any]  # of one pytree to another of its structure: linear, symmetric


class Lanczos(NamedTuple):
    """T and Q of k steps. Where the space that the start spans under A has only j < k dimensions,
    β_j and everything after it is zero.
    """

    diagonal: Float[Array, " k"]
    off_diagonal: Float[Array, " k"]  # the last, β_k, leads out of T
    basis: Any  # the structure of the start, k in front of every leaf's axes


class Eigenpairs(NamedTuple):
    """Ritz values by rising value, vectors, and how far each is from being an eigenpair."""

    values: Float[Array, " k"]
    vectors: Any  # k in front of every leaf's axes
    residuals: Float[Array, " k"]


def lanczos(matvec: MatVec, start: Any, steps: int) -> Lanczos:
    """k = `steps` products with A, from a start of any norm but 0. May be vmapped; jit its caller.

    matvec: takes and gives pytrees like `start`, whose leaves are float32 or wider within.
    Raises ValueError for a number of steps that is not from 1 to the number of entries.
    """
    flat, unravel = ravel_pytree(jax.tree.map(widened, start))
    if not 1 <= steps <= flat.size:
        raise ValueError(
            f"steps={steps} must be from 1 to {flat.size}, the number of entries of the start."
        )
    smallest = 10 * jnp.finfo(flat.dtype).eps  # of ‖A q‖, below which β is rounding

    def step(state: Any, j: jax.Array) -> tuple[Any, Any]:
        basis, q, size = state
        basis = basis.at[j].set(q)
        w = ravel_pytree(matvec(unravel(q)))[0].astype(q.dtype)
        alpha, size = q @ w, jnp.maximum(size, jnp.linalg.norm(w))
        for _ in range(2):  # the part along q_j and q_{j-1} goes with the rest
            w = w - (basis @ w) @ basis  # a transpose would be three times as slow on a CPU
        beta = jnp.linalg.norm(w)
        beta = jnp.where(beta > smallest * size, beta, 0)
        return (basis, w * jnp.where(beta > 0, 1 / beta, 0), size), (alpha, beta)

    first = flat / jnp.linalg.norm(flat)
    empty = jnp.zeros((steps, flat.size), flat.dtype)
    (basis, _, _), (alpha, beta) = lax.scan(
        step, (empty, first, jnp.zeros((), flat.dtype)), jnp.arange(steps)
    )
    return Lanczos(alpha, beta, jax.vmap(unravel)(basis))


def eigenpairs(found: Lanczos) -> Eigenpairs:
    """What T says of A's eigenvalues and vectors; zeros after a breakdown say nothing: their
    vectors are zero.
    """
    values, s = _decomposed(found)
    vectors = jax.tree.map(lambda q: jnp.tensordot(s.T, q, 1), found.basis)
    return Eigenpairs(values, vectors, jnp.abs(found.off_diagonal[-1] * s[-1]))


def quadrature(found: Lanczos) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Nodes θ_i and weights S_1i² of Gauss' rule for the spectrum as the start sees it; the
    weights sum to 1.
    """
    values, s = _decomposed(found)
    return values, s[0] ** 2


def _decomposed(found: Lanczos) -> tuple[jax.Array, jax.Array]:
    beta = found.off_diagonal[:-1]
    t = jnp.diag(found.diagonal) + jnp.diag(beta, 1) + jnp.diag(beta, -1)
    return jnp.linalg.eigh(t)
