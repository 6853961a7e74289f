"""SAM: Sharpness-Aware Minimization for Efficiently Improving Generalization. Foret, Kleiner,
Mobahi, Neyshabur, ICLR 2021, arXiv:2010.01412.

The step is taken with the gradient from where the loss rises most within ρ, at first order:
    ε = ρ g / ‖g‖,   g <- ∇L(θ + ε)

`optax.contrib.sam`, in its opaque mode, which is called once a step. It differs from it in:
1. The gradient's norm is taken plus 1e-12: a gradient of zero is no division by zero.
2. It may be given extra arguments that it has no use for.
"""

from typing import Any

import optax
from optax.contrib import SAMState


def sam(
    inner: optax.GradientTransformation, *, radius: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """`inner`, given gradients from ρ = `radius` up the hill.

    Its `update` takes `grad_fn(params, 0)`, the gradient elsewhere, of the same batch.
    """
    if radius <= 0:
        raise ValueError(f"radius={radius} must be above 0: of 0, leave it out.")
    uphill = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(radius))
    both = optax.contrib.sam(inner, uphill, opaque_mode=True)

    def update(
        updates: optax.Updates,
        state: SAMState,
        params: optax.Params | None = None,
        *,
        grad_fn: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, SAMState]:
        return both.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(both.init, update)
