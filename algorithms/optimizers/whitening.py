"""A matrix's preconditioner P = Qᵀ Q, Q = Q_L ⊗ Q_R, and how PSGD fits it; the equations: kron.py.

A factor is a triangular matrix, or a vector where it is diagonal; a parameter that is a vector
counts as a row without Q_L.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from algorithms.optimizers.eigenbases import Sides


def fit(
    g: Float[Array, "m n"],
    v: Float[Array, "m n"],
    factors: Sides,
    balanced: Bool[Array, ""],
    rate: float,
) -> Sides:
    """A matrix's factors after a step by G and V."""
    factors = jax.tree.map(lambda q, s: jnp.where(balanced, s * q, q), factors, balance(factors))
    damping = float(jnp.finfo(jnp.float32).eps) ** 0.5  # as if G had so much noise
    a = both(_times, factors, g + damping * jnp.mean(jnp.abs(g)) * v)
    b = both(_solve, factors, v)
    after = Sides(_step(factors.left, a, b, rate), _step(factors.right, a.T, b.T, rate))
    return jax.tree.map(lambda new, old: jnp.where(jnp.any(g != 0), new, old), after, factors)


def balance(factors: Sides) -> Sides:
    """What makes the largest entries of Q_L and Q_R equal and leaves their product."""
    largest = jax.tree.map(lambda q: jnp.max(jnp.abs(q)), factors)
    logs = jnp.log(jnp.stack(jax.tree.leaves(largest)))
    return jax.tree.map(lambda x: jnp.exp(jnp.mean(logs)) / x, largest)


def both(function: Callable, factors: Sides, x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """function(Q, X) of columns with Q_L, then of rows with Q_R."""
    for q in factors:
        x = x.T if q is None else function(q, x).T
    return x


def _times(q: jax.Array, x: jax.Array) -> jax.Array:  # Q X
    return q[:, None] * x if q.ndim == 1 else q @ x


def _solve(q: jax.Array, x: jax.Array) -> jax.Array:  # Q⁻ᵀ X
    return x / q[:, None] if q.ndim == 1 else solve_triangular(q, x, trans="T")


def _precondition(q: jax.Array, x: jax.Array) -> jax.Array:  # Qᵀ Q X
    return (q**2)[:, None] * x if q.ndim == 1 else q.T @ (q @ x)


def _step(q: jax.Array | None, a: jax.Array, b: jax.Array, rate: float) -> jax.Array | None:
    """Q_L by A and B."""
    if q is None:
        return None
    tiny = jnp.finfo(a.dtype).tiny
    if q.ndim == 1:
        p, m = jnp.sum(a**2, axis=1), jnp.sum(b**2, axis=1)
        return q - rate * (p - m) * q / (jnp.max(p + m) + tiny)
    p, m = a @ a.T, b @ b.T
    return q - rate * jnp.triu(p - m) / (norm_bound(p + m) + tiny) @ q


def norm_bound(x: Float[Array, "d d"]) -> Float[Array, ""]:
    """A lower bound of a symmetric matrix's spectral norm, seldom by more than √2 too low."""
    largest = jnp.max(jnp.abs(x))
    x = x / jnp.where(largest > 0, largest, 1)
    row = x[jnp.argmax(jnp.sum(x**2, axis=0))] @ x
    return largest * jnp.linalg.norm(x @ row) / jnp.maximum(jnp.linalg.norm(row), 1e-30)


def whitened(m: Float[Array, "m n"], factors: Sides) -> Float[Array, "m n"]:
    """P M, whose root mean square is to be 1, clipped where it is above 1.1."""
    move = both(_precondition, factors, m)
    return move / jnp.maximum(1, jnp.sqrt(jnp.mean(move**2)) / 1.1)
