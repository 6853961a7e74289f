"""Sparse evolutionary training (SET). Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta, Nature
Communications 2018, arXiv:1707.04780.

Layers are random sparse graphs, Erdős–Rényi, at first. Every so many steps (an epoch in the paper),
a fraction ζ of a layer's weights, those nearest to zero, is dropped, and as many are grown at
random among the ones that are not alive then.

This differs from the paper in: 1. what is dropped is the smallest in magnitude, as in the authors'
later code and in google-research/rigl, not the smallest positive and the largest negative ones;
2. what is grown begins at zero, as in google-research/rigl, with moments of zero.

`static` is the baseline of both papers: the first masks stay.
"""

import jax
import optax

from algorithms.pruning.distribution import distributed
from algorithms.pruning.masks import (
    MATCH,
    Rewiring,
    masked_training,
    periodic,
    regrown,
    require_fraction,
)


def sparse_evolutionary(
    inner: optax.GradientTransformation,
    *,
    steps: int,
    sparsity: float = 0.9,
    distribution: str = "erk",
    every: int = 100,
    drop: float = 0.3,
    stop: float = 0.75,
    match: str = MATCH,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on weights of which a fraction `sparsity` is zero, and moves at random.

    steps: of the run. distribution: "erk" or "uniform". drop: ζ. stop: the fraction of the run
    after which masks stay. match: the paths of the matrices that are pruned. Raises ValueError for
    numbers outside their ranges.
    """
    require_fraction("drop", drop)
    require_fraction("stop", stop)

    def rewired(alive, weights, gradients, count, key):
        return regrown(alive, weights, jax.random.uniform(key, alive.shape), drop)

    return masked_training(
        inner, alive=distributed(sparsity, distribution), match=match, seed=seed,
        rewiring=Rewiring(periodic(every, start=every, stop=stop * steps), rewired),
    )  # fmt: skip


def static(
    inner: optax.GradientTransformation,
    *,
    sparsity: float = 0.9,
    distribution: str = "erk",
    match: str = MATCH,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """`inner` on weights of which a fraction `sparsity`, drawn once, is zero."""
    return masked_training(
        inner, alive=distributed(sparsity, distribution), rewiring=None, match=match, seed=seed
    )
