"""Parameters before and after a step, for transformations that follow or move them.

Copies that live in a state are float32, or wider where the parameters are: an average of bfloat16
moves by less than its last bit.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def wide(params: optax.Params) -> optax.Params:
    """A copy of the parameters in float32 or wider."""
    return jax.tree.map(
        lambda p: jnp.array(p, jnp.promote_types(jnp.result_type(p), jnp.float32)), params
    )


def after(params: optax.Params | None, updates: optax.Updates) -> optax.Params:
    """The parameters that the updates lead to, in their own dtypes."""
    if params is None:
        raise ValueError("params=None must be the parameters: update(updates, state, params).")
    return optax.apply_updates(params, updates)


def towards(params: optax.Params, target: optax.Params) -> optax.Updates:
    """The updates that lead from the parameters to the target, in the parameters' dtypes."""
    return jax.tree.map(lambda p, t: (t - p).astype(p.dtype), params, target)


def followed(
    inner: optax.GradientTransformation,
    init: Callable[[optax.Params], Any],
    follow: Callable[[Any, optax.Params], Any],
) -> optax.GradientTransformation:
    """`inner`, and a state of its own that `follow(state, params)` makes after each step.

    A wrapper rather than a link of a chain: what it sees are the parameters that training goes on
    with, and nothing can come after it.
    """

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        return updates, follow(state, after(params, updates))

    return optax.chain(inner, optax.GradientTransformation(init, update))
