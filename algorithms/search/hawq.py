"""HAWQ-V2's score. Dong, Yao, Cai, Arfeen, Gholami, Mahoney, Keutzer, NeurIPS 2020,
arXiv:1911.03852. Notes: papers/hawq.md.

A layer's n_W weights are as sensitive as the mean eigenvalue of the loss's Hessian in them, its
trace over n_W; an option costs that times the squared change of the weights:
    Ω = tr(H) / n_W · ‖Ŵ - W‖²
The Hessian is taken as the Fisher information, of which tokens of one layer give
    tr(F) = Σ_t ‖g_t‖² ‖x_t‖²,   g = ∂L/∂y,   s = ½ tr(F) / n_W · ‖Ŵ - W‖² / n
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from algorithms.search.sensitivity import Passing, Sensitivity


def hawq() -> Sensitivity:
    """What an option costs of the loss, in nats per token, were all directions alike."""
    return Sensitivity(measure, score, gradients=True, weights=True)


def measure(passing: Passing) -> Float[Array, ""]:
    """tr(F)."""
    assert passing.g is not None
    return jnp.sum(jnp.sum(passing.g**2, -1) * jnp.sum(passing.x**2, -1))


def score(
    sums: Float[Array, ""], w: Float[Array, "*e o i"], d: Float[Array, "*e o i"], tokens: int
) -> Float[Array, ""]:
    """s."""
    return 0.5 * sums / w.size * jnp.sum(d**2) / tokens
