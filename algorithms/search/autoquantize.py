"""AutoQuantize's gradient score. NVIDIA Model Optimizer, `AutoQuantizeGradientSearcher`,
https://github.com/NVIDIA/Model-Optimizer. Notes: papers/autoquantize.md.

To second order in what an option changes of a layer's output, with the Fisher information of each
output in the place of the Hessian, the loss of n tokens grows by
    ΔL ≈ ½ Σ_t Σ_o g_to² (ŷ_to - y_to)²,   g = ∂L/∂y,   s = ΔL / n
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.search.sensitivity import Passing, Sensitivity


def autoquantize() -> Sensitivity:
    """What an option costs of the loss, in nats per token."""
    return Sensitivity(measure, score, gradients=True)


def measure(passing: Passing) -> Float[Array, ""]:
    """Σ g² (ŷ - y)²."""
    assert passing.g is not None
    return jnp.sum(passing.g**2 * passing.change**2)


def score(sums: Float[Array, ""], w: Array, d: Array, tokens: int) -> Float[Array, ""]:
    """s."""
    return 0.5 * sums / tokens
