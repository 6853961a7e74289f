"""An outer optimizer, of what an inner one does in k steps.

The slow parameters w and the fast ones start alike. The inner optimizer moves the fast ones; after
k steps, s = w - fast is to the outer optimizer a gradient at w, and the fast ones start again from
where it leads.

SNOO: Step-K Nesterov Outer Optimizer, Kallusky, Rao, Nandavanam, Shi, 2025, arXiv:2510.15830:
    b <- μ b + s,   w <- w - η (s + μ b)
With the matrices' inner optimizer being Muon this is MuLoCo (Thérien et al., 2025,
arXiv:2505.23725) of one worker, as with AdamW it is DiLoCo (Douillard et al., 2023,
arXiv:2311.08105) of one.

Lookahead: k steps forward, 1 step back, Zhang, Lucas, Ba, Hinton, NeurIPS 2019, arXiv:1907.08610:
    w <- w - α s
is SNOO of μ = 0. `optax.lookahead` computes the same for pairs of parameters; here they are
ordinary ones, and the state has the slow ones.

SNOO differs from the authors' code (modded-nanogpt, track 2) in:
1. The outer step is after steps k, 2k, …, as in the paper; there, after 1, k + 1, 2k + 1, ….
2. What is evaluated and saved are the slow parameters, which are the fast ones after every k-th
step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from algorithms.optimizers.evaluation import where_present
from algorithms.optimizers.iterates import after, towards, wide


class OuterState(NamedTuple):
    """Both optimizers' states and w, in float32 or wider, as the outer one's state is."""

    inner: optax.OptState
    outer: optax.OptState
    slow: optax.Params
    since: Int[Array, ""]  # inner steps since the last outer one

    def eval_params(self, params: optax.Params) -> optax.Params:
        return where_present(lambda state, _: state.slow, self, self.slow, params)


def snoo(
    inner: optax.GradientTransformation,
    *,
    step_size: float = 0.68,
    momentum: float = 0.37,
    every: int = 28,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, with a step of Nesterov momentum every k = `every` steps.

    step_size: η, which no schedule of the run is for. momentum: μ.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1.")
    return with_outer(inner, optax.sgd(step_size, momentum, nesterov=True), every)


def lookahead(
    inner: optax.GradientTransformation, *, step_size: float = 0.5, every: int = 5
) -> optax.GradientTransformationExtraArgs:
    """`inner`, that goes back a part of its way every k = `every` steps. step_size: α."""
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size={step_size} must be above 0 and at most 1.")
    return with_outer(inner, optax.sgd(step_size), every)


def with_outer(
    inner: optax.GradientTransformation, outer: optax.GradientTransformation, every: int
) -> optax.GradientTransformationExtraArgs:
    """`inner`, and a step of `outer` on what it did after every `every` steps."""
    if every < 1:
        raise ValueError(f"every={every} must be at least 1 step.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> OuterState:
        slow = wide(params)
        return OuterState(inner.init(params), outer.init(slow), slow, jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: OuterState, params: optax.Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, OuterState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        fast = after(params, updates)

        def step() -> tuple[optax.Updates, optax.OptState, optax.Params]:
            pseudo = jax.tree.map(lambda w, p: w - p, state.slow, fast)
            move, outer_state = outer.update(pseudo, state.outer, state.slow)
            slow = optax.apply_updates(state.slow, move)
            return towards(params, slow), outer_state, slow

        def go_on() -> tuple[optax.Updates, optax.OptState, optax.Params]:
            return optax.tree.cast_like(updates, params), state.outer, state.slow

        since = (state.since + 1) % every
        updates, outer_state, slow = jax.lax.cond(since == 0, step, go_on)
        return updates, OuterState(inner_state, outer_state, slow, since)

    return optax.GradientTransformationExtraArgs(init, update)
