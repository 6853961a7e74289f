"""Gradual magnitude pruning. Zhu, Gupta, ICLR 2018 workshop, arXiv:1710.01878.

From step t_0 to t_n, every Δt steps, the weights of the smallest magnitude become zero, so many
that a fraction s_t is (Sec. 3):
    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_n - t_0))³
What is zero gets no gradient, and so stays zero.

This differs from the official code, tensorflow/model-optimization, in: 1. there gradients reach
pruned weights between two prunings, so that they can come back; here, as in the paper, they do not;
2. of weights of the same magnitude at the threshold, the first ones stay, where it keeps all of
them; 3. t_n is a pruning whatever Δt is, so that s_f is reached, and the first is after a step at
least.
"""

import jax.numpy as jnp
import optax

from algorithms.pruning.distribution import distributed
from algorithms.pruning.masks import (
    MATCH,
    Rewiring,
    masked_training,
    periodic,
    require_fraction,
    top,
)


def gradual_magnitude(
    inner: optax.GradientTransformation,
    *,
    steps: int,
    sparsity: float = 0.9,
    initial: float = 0.0,
    every: int = 100,
    begin: float = 0.0,
    stop: float = 0.75,
    match: str = MATCH,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on weights of which more and more are zero, the same fraction of each matrix.

    steps: of the run. sparsity, initial: s_f and s_i. every: Δt. begin, stop: t_0 and t_n as
    fractions of the run. match: the paths of the matrices that are pruned. Raises ValueError for
    numbers outside their ranges.
    """
    require_fraction("stop", stop)
    if not 0 <= begin < stop:
        raise ValueError(f"begin={begin} must be from 0 to below stop={stop}.")
    if not 0 <= initial <= sparsity < 1:
        raise ValueError(f"initial={initial} must be from 0 to sparsity={sparsity}, below 1.")
    start, end = int(begin * steps), max(int(stop * steps), int(begin * steps) + 1)

    def rewired(alive, weights, gradients, count, key):
        p = jnp.clip((count - start) / (end - start), 0, 1)
        s = (initial - sparsity) * (1 - p) ** 3 + sparsity
        kept = jnp.maximum(jnp.round(alive.shape[-1] * (1 - s)), 1).astype(jnp.int32)
        return alive & top(jnp.where(alive, jnp.abs(weights.astype(jnp.float32)), -1.0), kept)

    regular = periodic(every, start=start, stop=end)
    return masked_training(
        inner, alive=distributed(0.0, "uniform"), match=match, seed=0,
        rewiring=Rewiring(lambda count: regular(count) | (count == end), rewired),
    )  # fmt: skip
