"""Kronecker factors of a matrix's gradients and bases near their eigenvectors: what SOAP and its
relatives share.

A gradient G [m, n] (axes before are a batch) has a factor L [m, m] on its left, R [n, n] on its
right, and orthogonal Q_L, Q_R that follow their eigenvectors. A side that is too wide has none of
them and stays as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Sides(NamedTuple):
    """What a matrix has on its left and on its right; None where a side is too wide."""

    left: Any
    right: Any


def validate(*, frequency: int, max_size: int, eps: float, **decays: float) -> None:
    """Raise ValueError for settings that no optimizer here takes."""
    if frequency < 1:
        raise ValueError(f"frequency={frequency} must be at least 1: steps from basis to basis.")
    if max_size < 0:
        raise ValueError(f"max_size={max_size} must not be negative: of 0, no side has a factor.")
    if eps <= 0:
        raise ValueError(f"eps={eps} must be above 0: the first update is 0 / eps.")
    for name, decay in decays.items():
        if not 0 <= decay < 1:
            raise ValueError(f"{name}={decay} must be at least 0 and below 1.")


def identities(x: Float[Array, "*batch m n"], max_size: int) -> Sides:
    """The first bases of x's sides."""

    def identity(d: int) -> jax.Array | None:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.tile(jnp.eye(d, dtype=dtype), (*x.shape[:-2], 1, 1)) if d <= max_size else None

    return Sides(identity(x.shape[-2]), identity(x.shape[-1]))


def rotate(x: Float[Array, "*batch m n"], bases: Sides) -> Float[Array, "*batch m n"]:
    """Q_Lᵀ X Q_R."""
    x = x if bases.left is None else bases.left.mT @ x
    return x if bases.right is None else x @ bases.right


def rotate_back(x: Float[Array, "*batch m n"], bases: Sides) -> Float[Array, "*batch m n"]:
    """Q_L X Q_Rᵀ."""
    return rotate(x, jax.tree.map(lambda q: q.mT, bases))


def unit_rms(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Each matrix with a mean square of 1."""
    return x / (1e-30 + jnp.sqrt(jnp.mean(x**2, axis=(-2, -1), keepdims=True)))


def refreshed(
    count: Int[Array, ""],
    frequency: int,
    again: Callable[[Sides, Sides, Any], tuple[Sides, Any]],
    factors: Sides,
    bases: Sides,
    nu: Float[Array, "*batch m n"] | None,
) -> tuple[Sides, Any]:
    """Bases, and the squares that are kept in them, for the next step.

    After the first gradient they are eigenvectors; `again(factors, bases, nu)` gives them in every
    frequency-th step after it; in between they stay.
    """
    turn = jnp.where(count == 0, 1, jnp.where(count % frequency == 0, 2, 0))
    return jax.lax.switch(turn, [_stay, _first, again], factors, bases, nu)


def _stay(factors: Sides, bases: Sides, nu: Any) -> tuple[Sides, Any]:
    return bases, nu


def _first(factors: Sides, bases: Sides, nu: Any) -> tuple[Sides, Any]:
    rank = min((f.shape[-1] for f in jax.tree.leaves(factors)), default=0)
    return jax.tree.map(lambda f: eigenbasis(f, rank), factors), nu


def eigenbasis(factor: Float[Array, "*batch d d"], rank: int) -> Float[Array, "*batch d d"]:
    """Eigenvectors by falling eigenvalue, of a matrix of that rank at most.

    A solver's basis of the null space depends on rounding, so it is made of the first unit vectors:
    one program and another give the same numbers.
    """
    vectors = jnp.linalg.eigh(factor)[1][..., ::-1]
    rest = jnp.eye(factor.shape[-1], dtype=factor.dtype)[:, : factor.shape[-1] - rank]
    rest = jnp.broadcast_to(rest, (*factor.shape[:-2], *rest.shape))
    return jnp.linalg.qr(jnp.concatenate([vectors[..., :rank], rest], axis=-1))[0]
