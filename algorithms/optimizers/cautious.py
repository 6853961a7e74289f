"""Cautious updates and cautious weight decay: what disagrees in sign is left out.

Cautious Optimizers: Improving Training with One Line of Code. Liang, Chen, Liu, Liu, 2024,
arXiv:2411.16085. Of a direction u, downhill being -u, and the gradient g,
    φ = 1[u g > 0],   u <- u φ / max(mean(φ), 1e-3)

Cautious Weight Decay. Chen, Li, Liang, Su, Xie, Pierse, Liang, Lao, Liu, ICLR 2026,
arXiv:2510.12402.
    u <- u + λ 1[u θ ≥ 0] θ
decays a parameter only where the step leads towards zero by itself.

Cautious updates differ from the paper in:
1. As in the official code, the scale is 1/mean(φ), without the paper's ξ of 1 element.
2. Of stacked matrices, the mean is of each matrix.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.optimizers.matrices import own_axes

LEAST = 1e-3  # share of elements: no update grows by more than its inverse


def cautious(direction: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A direction, without what the gradient contradicts; the rest grows by as much.

    A wrapper rather than a link of a chain, where the gradient is not seen any more. It belongs
    around a direction such as `optax.scale_by_adam()`, that has the gradient's sign; decay and
    learning rate come after.
    """
    direction = optax.with_extra_args_support(direction)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, Any]:
        u, state = direction.update(updates, state, params, **extra)
        return jax.tree.map(agreeing, u, updates), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def agreeing(u: Float[Array, "*shape"], g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """u where its sign is that of g, scaled by the inverse share of such elements."""
    agrees = (jnp.sign(u) * jnp.sign(g)) > 0  # u g underflows where both are small
    dtype = jnp.promote_types(u.dtype, jnp.float32)
    share = jnp.mean(agrees, axis=own_axes(u), keepdims=True, dtype=dtype)
    return jnp.where(agrees, u / jnp.maximum(share, LEAST), 0).astype(u.dtype)


def add_cautious_decayed_weights(weight_decay: float = 0.0) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, where update and parameter agree in sign or one is zero."""

    def decayed(u: Array, p: Array) -> Array:
        return u + jnp.where(jnp.sign(u) * jnp.sign(p) >= 0, weight_decay * p, 0).astype(u.dtype)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        if params is None:
            raise ValueError("params=None must be the parameters: update(updates, state, params).")
        return jax.tree.map(decayed, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def adamw_cautious(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with cautious updates; its moments are in the parameter's dtype."""
    return optax.chain(
        cautious(optax.scale_by_adam(b1, b2, eps)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def adamw_cautious_decay(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> optax.GradientTransformation:
    """AdamW with cautious weight decay; its moments are in the parameter's dtype."""
    return optax.chain(
        optax.scale_by_adam(b1, b2, eps),
        add_cautious_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
