"""Dion2. Ahn, Amsel, Langford, 2025, arXiv:2512.16928.

Muon at a fraction of its cost: of rows or columns of the momentum, whichever are fewer, those with
the largest ‖·‖₁ alone are orthogonalized, and of those alone the momentum decays. What is left out
waits there until it is large (error feedback):
    M <- M + G
    K = the α · rows with the largest ‖M_r‖₁
    O_K = polar(M_K),   M_K <- μ M_K
    W <- (1 - η λ) W - η √(out/in) O_K
With α = 1 this is Muon without Nesterov's look ahead.

This differs from the official code in:
1. K is chosen in whole matrices, where that code chooses by default in each device's shard;
2. polar's steps are those that the Polar Express paper lists, not five computed with more safety.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from algorithms.linalg import polar_factor, quintics
from algorithms.optimizers.matrices import require_matrices


class Dion2State(NamedTuple):
    """M, in the parameters' dtype."""

    momentum: Any


def dion2(
    learning_rate: optax.ScalarOrSchedule,
    *,
    fraction: float = 0.25,
    momentum: float = 0.95,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
    weight_decay: float = 0.01,
) -> optax.GradientTransformation:
    """Dion2 for parameters that are matrices."""
    return optax.chain(
        scale_by_dion2(fraction=fraction, momentum=momentum, coefficients=coefficients),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_dion2(
    *,
    fraction: float = 0.25,
    momentum: float = 0.95,
    coefficients: str | Sequence[Sequence[float]] = "polar_express",
) -> optax.GradientTransformation:
    """√(out/in) O, zero but in K. fraction: α, rounded up. momentum: μ."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must be above 0 and at most 1.")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1.")
    choose = jnp.vectorize(functools.partial(largest, fraction=fraction), signature="(i,o)->(k)")
    move = jnp.vectorize(
        functools.partial(direction, steps=quintics(coefficients)), signature="(i,o),(k)->(i,o)"
    )
    keep = jnp.vectorize(functools.partial(decay, momentum=momentum), signature="(i,o),(k)->(i,o)")

    def init(params: optax.Params) -> Dion2State:
        require_matrices(params, "dion2")
        return Dion2State(optax.tree.zeros_like(params))

    def update(
        updates: optax.Updates, state: Dion2State, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Dion2State]:
        m = jax.tree.map(jnp.add, updates, state.momentum)
        chosen = jax.tree.map(choose, m)
        return jax.tree.map(move, m, chosen), Dion2State(jax.tree.map(keep, m, chosen))

    return optax.GradientTransformation(init, update)


def largest(m: Float[Array, "i o"], fraction: float) -> Int[Array, " k"]:
    """K: of the outputs, where they are no more than the inputs, else of these."""
    i, o = m.shape
    norms = jnp.sum(jnp.abs(m), axis=0 if o <= i else 1)
    return jax.lax.top_k(norms, math.ceil(fraction * min(i, o)))[1]


def _slices(m: Float[Array, "i o"], chosen: Int[Array, " k"]) -> tuple[Any, Any]:
    i, o = m.shape
    return (slice(None), chosen) if o <= i else (chosen, slice(None))


def direction(
    m: Float[Array, "i o"], chosen: Int[Array, " k"], steps: Sequence[Sequence[float]]
) -> Float[Array, "i o"]:
    """√(out/in) O."""
    (i, o), slices = m.shape, _slices(m, chosen)
    return jnp.zeros_like(m).at[slices].set(math.sqrt(o / i) * polar_factor(m[slices], steps))


def decay(m: Float[Array, "i o"], chosen: Int[Array, " k"], momentum: float) -> Float[Array, "i o"]:
    """M, of K times μ."""
    return m.at[_slices(m, chosen)].multiply(momentum)
