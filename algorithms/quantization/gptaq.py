"""Asymmetric calibration. GPTAQ, Li, Yin, Lee, Xiao, Panda, ICML 2025, arXiv:2504.02692. Notes:
papers/gptaq.md.

A layer of a compressed model reads X where the original model has X̃, so what to come near is W X̃.
With G = X Xᵀ + λ I and C = (X̃ - X) Xᵀ,
    W' = W (I + α C G⁻¹)
makes ‖W X̃ - Ŵ X‖² = ‖(W' - Ŵ) X‖² + what no Ŵ changes, for α = 1 and λ = 0: a method of any kind,
given W' in the place of W, compensates what its predecessors lost.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float

from algorithms import hessian
from algorithms.hessian import HessianStats
from algorithms.layerwise import LayerwiseMethod, WithOwn, beside


class AsymmetricStats(NamedTuple):
    """X Xᵀ and (X̃ - X) Xᵀ."""

    gram: Float[Array, "i i"] | None  # None where the method's own have it
    cross: Float[Array, "i i"]


def gptaq(
    *, strength: float = 0.5, damping: float = 0.01
) -> Callable[[LayerwiseMethod], LayerwiseMethod]:
    """Have a method aim at what the original model's layer gives.

    strength: α. damping: λ as a fraction of mean(diag(X Xᵀ)).
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1: of 0, leave it out.")
    if damping < 0:
        raise ValueError(f"damping={damping} must not be negative.")

    def wrap(method: LayerwiseMethod) -> LayerwiseMethod:
        shared = method.observe is hessian.observe

        def init(i: int) -> AsymmetricStats:
            return AsymmetricStats(None if shared else jnp.zeros((i, i)), jnp.zeros((i, i)))

        def aimed(w: Float[Array, "o i"], stats: WithOwn) -> Float[Array, "o i"]:
            gram = stats.inner.gram if shared else stats.own.gram
            return aim(w, gram, stats.own.cross, strength, damping)

        within = beside(method, init, observe)
        return within._replace(
            compress=lambda w, stats, *key: within.compress(aimed(w, stats), stats, *key),
            error=lambda w, approximation, stats: within.error(
                aimed(w, stats), approximation, stats
            ),
            paired=True,
        )

    return wrap


def observe(
    stats: AsymmetricStats, x: Float[Array, "n i"], original: Float[Array, "n i"]
) -> AsymmetricStats:
    """Add n activations, and what the original model has in their place."""
    gram = stats.gram
    if gram is not None:
        gram = hessian.observe(HessianStats(gram), x).gram
    cross = stats.cross + ((original - x).T @ x).astype(stats.cross.dtype)
    return AsymmetricStats(gram, cross)


def aim(
    w: Float[Array, "o i"],
    gram: Float[Array, "i i"],
    cross: Float[Array, "i i"],
    strength: float = 0.5,
    damping: float = 0.01,
) -> Float[Array, "o i"]:
    """W', given X Xᵀ and (X̃ - X) Xᵀ, summed alike; NaN where X Xᵀ + λ I is not positive definite.

    Weights of inputs that are always zero stay as they are.
    """
    dead = jnp.diag(gram) == 0
    ridge = damping * jnp.mean(jnp.diag(gram)) + dead.astype(gram.dtype)
    factor = cho_factor(gram + jnp.diag(ridge))
    return w + strength * cho_solve(factor, (w @ cross).T).T
