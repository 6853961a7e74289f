"""Optimizers of one array at a time, over pytrees of any kind."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def wide_zeros(x: jax.Array) -> jax.Array:
    """Zeros like x, in float32 at least: what optimizers' states are kept in."""
    return jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))


def map_leaves(function: Callable[..., tuple], grads: Any, *states: Any) -> tuple[Any, ...]:
    """function(gradient, *its part of each state), which gives as many values, for each leaf.

    The parts may be pytrees. What comes back are trees like `grads`, one for each value.
    """
    leaves = jax.tree.leaves(grads)
    structure: Any = jax.tree.structure(grads)
    if not leaves:  # all are masked
        return (grads, *states)
    parts = map(structure.flatten_up_to, states)
    found = [function(*each) for each in zip(leaves, *parts, strict=True)]
    return tuple(structure.unflatten(each) for each in zip(*found, strict=True))
