"""Exponential moving averages of the parameters, over all of training or over its end.

Averaging: Polyak and Juditsky, SIAM J. Control Optim. 1992; of the end alone: Jain et al., JMLR
2018, arXiv:1610.03774. With θ_t the parameters after step t of the average (1 is its first),
    w_t = (1 - β) / (1 - βᵗ)
    θ̄_t = (1 - w_t) θ̄_{t-1} + w_t θ_t
This is the exponential average of θ_1 … θ_t divided by 1 - βᵗ, as Adam corrects its moments: the
initial parameters have no share in it, and no warm-up of β is needed.

modded-nanogpt's tail-EMA (track 3, pull request 325) differs: it starts from a copy of the
parameters, without that correction, and is blended with the last ones.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from algorithms.optimizers.evaluation import where_present
from algorithms.optimizers.iterates import followed, wide


class EmaState(NamedTuple):
    """The average, in float32 or wider; before it starts, the parameters themselves."""

    average: optax.Params
    steps: Int[Array, ""]  # of training

    def eval_params(self, params: optax.Params) -> optax.Params:
        return where_present(lambda state, _: state.average, self, self.average, params)


def ema(
    inner: optax.GradientTransformation, *, decay: float = 0.999
) -> optax.GradientTransformation:
    """`inner`, evaluated at the average of all parameters that it passed through.

    decay: β.
    """
    return _from(inner, decay, 0)


def tail_ema(
    inner: optax.GradientTransformation, *, steps: int, tail: float = 0.25, decay: float = 0.99
) -> optax.GradientTransformation:
    """`inner`, evaluated at the average over the end of training, and at its own parameters before.

    steps: of the run. tail: the fraction of them that is averaged. decay: β.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    if not 0 < tail <= 1:
        raise ValueError(f"tail={tail} must be above 0 and at most 1.")
    return _from(inner, decay, steps - max(round(tail * steps), 1))


def _from(
    inner: optax.GradientTransformation, decay: float, start: int
) -> optax.GradientTransformation:
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay} must be above 0 and below 1.")

    def init(params: optax.Params) -> EmaState:
        return EmaState(wide(params), jnp.zeros([], jnp.int32))

    def follow(state: EmaState, params: optax.Params) -> EmaState:
        steps = optax.safe_increment(state.steps)
        t = jnp.maximum(steps - start, 1)  # before the start every step is a first one
        weight = (1 - decay) / -jnp.expm1(t * math.log(decay))

        def mean(average: Array, p: Array) -> Array:
            w = jnp.where(t == 1, 1, weight).astype(average.dtype)
            return (1 - w) * average + w * p

        return EmaState(jax.tree.map(mean, state.average, params), steps)

    return followed(inner, init, follow)
