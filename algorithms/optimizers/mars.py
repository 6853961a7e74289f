"""MARS: Unleashing the Power of Variance Reduction for Training Large Models. Yuan, Liu, Wu, Zhou,
Gu, ICML 2025, arXiv:2411.10438.

The gradient is corrected by what it changed by, then an optimizer goes on with c in its place:
    c_t = g_t + γ β₁/(1 - β₁) (g_t - g_{t-1}),   c_t <- c_t / max(1, ‖c_t‖)
MARS-AdamW gives c to Adam's moments, MARS-Lion takes the sign of m_t = β₁ m_{t-1} + (1 - β₁) c_t.
Before `optax.contrib.muon(nesterov=False)`, c makes MARS-Shampoo.

This is the approximate variant, in which g_{t-1} is the last step's gradient, of another batch. It
differs from the paper in:
1. As in the official code, g_0 is 0, so that c_1 = (1 + γ β₁/(1 - β₁)) g_1.
2. As there, the norm is of each parameter alone; of stacked ones, of each matrix.
In the official code only parameters of two axes are corrected, and others get AdamW; that is for
`grouped` to say (conf/optimizer/mars_adamw.yaml).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.numerics import widened
from algorithms.optimizers.matrices import own_axes


class MarsState(NamedTuple):
    """The last gradient, in its parameter's dtype."""

    last: optax.Updates


def correct_by_last_gradient(
    *, gamma: float = 0.025, b1: float = 0.95
) -> optax.GradientTransformation:
    """From g to c. b1: β₁ of the optimizer that follows."""
    if not 0 <= b1 < 1:
        raise ValueError(f"b1={b1} must be at least 0 and below 1.")
    strength = gamma * b1 / (1 - b1)

    def init(params: optax.Params) -> MarsState:
        return MarsState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: MarsState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, MarsState]:
        c = jax.tree.map(lambda g, last: clipped(g + strength * (g - last)), updates, state.last)
        return c, MarsState(optax.tree.cast_like(updates, state.last))

    return optax.GradientTransformation(init, update)


def clipped(c: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """c, with the norm of each matrix or vector at most 1."""
    wide = widened(c)
    norm = jnp.sqrt(jnp.sum(wide**2, axis=own_axes(c), keepdims=True))
    return (wide / jnp.maximum(norm, 1)).astype(c.dtype)


def mars_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 0.025,
    b1: float = 0.95,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW of corrected gradients; its moments are in the parameter's dtype."""
    return optax.chain(
        correct_by_last_gradient(gamma=gamma, b1=b1),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def mars_lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float = 0.025,
    b1: float = 0.95,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """The sign of an average of corrected gradients; as in the official code, of one β."""
    return optax.chain(
        correct_by_last_gradient(gamma=gamma, b1=b1),
        optax.ema(b1, debias=False),
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
