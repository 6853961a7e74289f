"""The Hessian of a layer's squared output error, and its inverse factor.

For y = W x and calibration activations X, ‖W X - Ŵ X‖² = tr(ΔW G ΔWᵀ) with G = X Xᵀ: one i × i
matrix for all rows of all readers of a site.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from algorithms.layerwise import LayerwiseMethod
from algorithms.numerics import relative_error, sum_over_rows
from kernels.gram import gram


class HessianStats(NamedTuple):
    """G = Σ x xᵀ over the activations seen, in float32 (or their wider type)."""

    gram: Float[Array, "i i"]


def init(i: int) -> HessianStats:
    return HessianStats(jnp.zeros((i, i)))


def observe(stats: HessianStats, x: Float[Array, "n i"]) -> HessianStats:
    return HessianStats(stats.gram + gram(x).astype(stats.gram.dtype))


def output_error(
    w: Float[Array, "o i"], approximation: Float[Array, "o i"], stats: HessianStats
) -> Float[Array, ""]:
    """‖(W - Ŵ) X‖² / ‖W X‖² on the calibration activations; zero where both are."""

    def of_row(w: Float[Array, " i"], approximation: Float[Array, " i"]) -> Array:
        d = w - approximation
        return jnp.stack([d @ stats.gram @ d, w @ stats.gram @ w])

    return relative_error(*sum_over_rows(of_row, w, approximation))


def by_activity(h: Float[Array, "i i"], together: int = 1) -> Int[Array, " i"]:
    """Columns with the largest diag(H) first; those of a block of `together` stay together."""
    busiest = jnp.argsort(-jnp.diag(h).reshape(-1, together).sum(1))
    return (busiest[:, None] * together + jnp.arange(together)).reshape(-1)


def dead_inputs(stats: HessianStats) -> Bool[Array, " i"]:
    """Inputs that were zero in every activation seen."""
    return jnp.diag(stats.gram) == 0


def notes(stats: HessianStats) -> dict[str, Array]:
    """What a record keeps of a site: how many of its inputs are dead."""
    return {"dead_inputs": dead_inputs(stats).sum()}


def method(compress: Callable[..., Any], **fields: Any) -> LayerwiseMethod:
    """A method whose statistics are the Hessian, and whose error is that of the output."""
    return LayerwiseMethod(init, observe, compress, output_error, notes=notes, **fields)


def inverse_factor(h: Float[Array, "i i"], damping: float) -> Float[Array, "i i"]:
    """Upper triangular U with Uᵀ U = (H + λ I)⁻¹, λ = damping · mean(diag H).

    With the rows and columns reversed, H = R Rᵀ for an upper triangular R, and U = R⁻¹: one
    factorization instead of the usual Cholesky, inverse, Cholesky. NaN where H + λ I is not
    positive definite.
    """
    h = h + damping * jnp.mean(jnp.diag(h)) * jnp.eye(h.shape[0], dtype=h.dtype)
    r = lax.linalg.cholesky(h[::-1, ::-1], symmetrize_input=False)[::-1, ::-1]
    return invert_upper(r)


def invert_upper(r: Float[Array, "i i"], halvings: int = 3) -> Float[Array, "i i"]:
    """R⁻¹ of an upper triangular R, by halves: most of it matrix products, which are faster than
    a triangular solve. The number of halvings is fixed, so that the graph does not grow with i.
    """
    n = r.shape[0]
    if n < 2 or not halvings:
        return solve_triangular(r, jnp.eye(n, dtype=r.dtype), lower=False)
    m = n // 2
    a, c = invert_upper(r[:m, :m], halvings - 1), invert_upper(r[m:, m:], halvings - 1)
    return jnp.block([[a, -a @ r[:m, m:] @ c], [jnp.zeros((n - m, m), r.dtype), c]])
