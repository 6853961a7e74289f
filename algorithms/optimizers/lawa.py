"""LAWA: Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight
Averaging. Kaddour, NeurIPS 2022 Has it Trained Yet workshop, arXiv:2209.14981.

Every n steps a checkpoint is taken; what is evaluated is the mean of the latest k:
    θ̄ = (1/k) Σ_{i=0}^{k-1} θ_{(t-i) n}

This differs from the official code in:
1. The checkpoints are held on the device, in float32 or wider: k copies of the parameters.
2. No `start_steps`: before the first checkpoint the parameters themselves are evaluated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from algorithms.optimizers.evaluation import where_present
from algorithms.optimizers.iterates import followed, wide


class LawaState(NamedTuple):
    """The latest checkpoints, each leaf [k, …], the oldest overwritten first."""

    checkpoints: optax.Params
    taken: Int[Array, ""]  # checkpoints so far
    since: Int[Array, ""]  # steps since the last one

    def eval_params(self, params: optax.Params) -> optax.Params:
        return where_present(_mean, self, self.checkpoints, params)


def _mean(state: LawaState, params: optax.Params) -> optax.Params:
    def mean(checkpoints: Array, p: Array) -> Array:
        held = jnp.minimum(state.taken, len(checkpoints))
        return jnp.where(held > 0, checkpoints.sum(0) / jnp.maximum(held, 1), p)  # others are zero

    return jax.tree.map(mean, state.checkpoints, params)


def lawa(
    inner: optax.GradientTransformation, *, every: int = 10, checkpoints: int = 6
) -> optax.GradientTransformation:
    """`inner`, evaluated at the mean of its latest checkpoints.

    every: n, the steps between them. checkpoints: k.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    if checkpoints < 1:
        raise ValueError(f"checkpoints={checkpoints} must be at least 1.")

    def init(params: optax.Params) -> LawaState:
        empty = jax.tree.map(lambda p: jnp.zeros((checkpoints, *p.shape), p.dtype), wide(params))
        return LawaState(empty, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def follow(state: LawaState, params: optax.Params) -> LawaState:
        since = (state.since + 1) % every
        due = since == 0
        slot = state.taken % checkpoints

        def put(held: Array, p: Array) -> Array:
            return held.at[slot].set(jnp.where(due, p.astype(held.dtype), held[slot]))

        held = jax.tree.map(put, state.checkpoints, params)
        return LawaState(held, state.taken + due.astype(jnp.int32), since)

    return followed(inner, init, follow)
