"""EMA-Nesterov: Stabilizing Nesterov's Lookahead for Accelerated Deep Learning Optimization.
Yau, Li, Glentis, Boreiko, Wai, Hong, 2026, arXiv:2605.25395.

With A any optimizer's step and x the iterates, gradients are taken ahead of x, along the average m
of what it did:
    y_t = x_t + β_t m_t,   x_{t+1} = A(y_t),   m_{t+1} = γ m_t + (1 - γ) (x_{t+1} - x_t)
β_t is 0 at the beginning and at the end of training.

The parameters that training sees are y; what is evaluated and saved is x.

This differs from the official code in:
1. β is a number or a schedule of its own: there it may follow the learning rate, which is
   `lookahead=scaled(schedule, β)` here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from algorithms.optimizers.evaluation import where_present
from algorithms.optimizers.iterates import after, towards, wide


class EmaNesterovState(NamedTuple):
    """x and m, in float32 or wider."""

    inner: optax.OptState
    iterate: optax.Params
    direction: optax.Params
    taken: Int[Array, ""]  # steps

    def eval_params(self, params: optax.Params) -> optax.Params:
        return where_present(lambda state, _: state.iterate, self, self.iterate, params)


def ema_nesterov(
    inner: optax.GradientTransformation,
    *,
    steps: int,
    lookahead: optax.ScalarOrSchedule = 0.6,
    decay: float = 0.99,
    begin: float = 0.16,
    end: float = 0.76,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with gradients from ahead of its iterates.

    steps: of the run. lookahead: β. decay: γ. begin, end: the fractions of the run between which it
    looks ahead; m is averaged all along.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay={decay} must be at least 0 and below 1.")
    if not 0 <= begin <= end <= 1:
        raise ValueError(f"begin={begin} and end={end} must be in order between 0 and 1.")
    inner = optax.with_extra_args_support(inner)
    first, last = round(begin * steps), round(end * steps)

    def beta(count: Array) -> Array:
        ahead = lookahead(count) if callable(lookahead) else lookahead
        return jnp.where((count >= first) & (count < last), ahead, 0)

    def init(params: optax.Params) -> EmaNesterovState:
        still = jax.tree.map(jnp.zeros_like, wide(params))
        return EmaNesterovState(inner.init(params), wide(params), still, jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: EmaNesterovState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, EmaNesterovState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        x = wide(after(params, updates))
        m = jax.tree.map(
            lambda m, x, before: decay * m + (1 - decay) * (x - before),
            state.direction, x, state.iterate,
        )  # fmt: skip
        taken = optax.safe_increment(state.taken)
        ahead = jax.tree.map(lambda x, m: x + beta(taken).astype(x.dtype) * m, x, m)
        return towards(params, ahead), EmaNesterovState(inner_state, x, m, taken)

    return optax.GradientTransformationExtraArgs(init, update)
