"""RigL. Evci, Gale, Menick, Castro, Elsen, ICML 2020, arXiv:1911.11134.

Every ΔT steps until T_end, in place of a step of the optimizer (Alg. 1), of the n weights w that
are alive in a layer the k smallest are dropped, and those of the k largest gradients of the dense
layer grown, among the ones that are not alive then:
    k = ⌊f n⌋,   f(t) = α/2 (1 + cos(π t / T_end)),   drop by |w|,   grow by |∂L/∂w|
What is grown begins at zero, with moments of zero.

This differs from the official code, google-research/rigl, in: 1. a step that rewires is counted as
one, as in Alg. 1; 2. weights of the same magnitude are dropped in their order, where it adds noise
of 1e-5; 3. a weight that is not alive is never kept in place of one that is alive and zero; 4. in a
step that rewires, a schedule within the optimizer does not move on.
"""

import jax.numpy as jnp
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


def rigl(
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
    """`inner` on weights of which a fraction `sparsity` is zero, and moves.

    steps: of the run. distribution: "erk" or "uniform". every: ΔT. drop: α. stop: T_end as a
    fraction of the run. match: the paths of the matrices that are pruned: a first layer that stays
    dense is one that it does not match. Raises ValueError for numbers outside their ranges.
    """
    require_fraction("drop", drop)
    require_fraction("stop", stop)
    end = max(stop * steps, 1.0)

    def rewired(alive, weights, gradients, count, key):
        fraction = drop / 2 * (1 + jnp.cos(jnp.pi * count / end))
        return regrown(alive, weights, jnp.abs(gradients), fraction)

    return masked_training(
        inner, alive=distributed(sparsity, distribution), match=match, seed=seed,
        rewiring=Rewiring(periodic(every, start=0, stop=end), rewired, instead=True),
    )  # fmt: skip
