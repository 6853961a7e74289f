"""Hyperball. Wen, Dang, Lyu, Ma, Liang, 2026, arXiv:2606.16899.

A matrix keeps the norm it began with, and a step is a fraction of that norm: of any optimizer whose
direction is u, with R = ‖W_0‖_F,
    W <- R · normed(W - η R · normed(u)),    normed(x) = x / ‖x‖_F
so η is the angle of a step, nearly, and weight decay has nothing left to do.

This differs from the authors' code (marin) in:
1. R is kept. There it is ‖W‖_F at each step, which drifts by rounding, in bfloat16 much.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.linalg import frobenius_norm
from algorithms.optimizers.matrices import require_matrices

EPSILON = 1e-10


class SphereState(NamedTuple):
    """R, [..., 1, 1] for a kernel [..., in, out], in float32 at least."""

    radius: Any


def hyperball(
    inner: optax.GradientTransformation, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Matrices on spheres, moved in the direction that `inner` gives.

    inner: of optax's `scale_by_` kind, without a learning rate and without weight decay. A matrix
    that is zero at the start stays zero: initialize it otherwise, or give it another optimizer.
    """
    return optax.chain(
        inner,
        scale_to_parameters(),
        optax.scale_by_learning_rate(learning_rate),
        keep_norms(),
    )


def scale_to_parameters() -> optax.GradientTransformation:
    """Updates with the norms of their matrices."""

    def scaled(u: Float[Array, "*e i o"], w: Float[Array, "*e i o"]) -> Float[Array, "*e i o"]:
        return (u * (frobenius_norm(w) / jnp.maximum(frobenius_norm(u), EPSILON))).astype(w.dtype)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        if params is None:
            raise ValueError("params=None must be the parameters: their norms are what is kept.")
        return jax.tree.map(scaled, updates, params)

    return optax.stateless(update)


def keep_norms() -> optax.GradientTransformation:
    """The last of a chain: its updates leave each matrix with the norm that it had at `init`."""

    def init(params: optax.Params) -> SphereState:
        require_matrices(params, "hyperball")
        return SphereState(jax.tree.map(frobenius_norm, params))

    def update(
        updates: optax.Updates, state: SphereState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SphereState]:
        return jax.tree.map(onto_sphere, updates, params, state.radius), state

    return optax.GradientTransformation(init, update)


def onto_sphere(
    u: Float[Array, "*e i o"], w: Float[Array, "*e i o"], radius: Float[Array, "*e 1 1"]
) -> Float[Array, "*e i o"]:
    """What takes W to R · normed(W + u)."""
    whole = w.astype(radius.dtype)
    moved = whole + u
    return (moved * (radius / jnp.maximum(frobenius_norm(moved), EPSILON)) - whole).astype(w.dtype)
