"""BlockLDLQ: rounding with feedback, a block of columns at a time. Tseng et al., ICML 2024,
arXiv:2402.04396, Sec. 4.1, after LDLQ of Chee et al., NeurIPS 2023, arXiv:2307.13304.

For tr((W - Ŵ) H (W - Ŵ)ᵀ) with H = G + λ I = L D Lᵀ, where L is lower triangular with identities of
c × c on its diagonal and D is block diagonal. For block k from the last to the first:
    Ŵ_k = quantize(W_k + Σ_{j>k} (W_j - Ŵ_j) L_jk)
What a block is asked to make up for is a product with the errors so far, so that
    (W - Ŵ) L = the error of each block on its own,   tr((W - Ŵ) H (W - Ŵ)ᵀ) = Σ_k tr(E_k D_k E_kᵀ).
GPTQ walks from the first column to the last and calls the same procedure by another name.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

Codes = Any  # a pytree of arrays, each method's own
# A block of columns, already corrected, and its index to an approximation and the codes of it.
Quantize = Callable[[Float[Array, "o c"], Int[Array, ""]], tuple[Float[Array, "o c"], Codes]]


def block_ldlq(
    w: Float[Array, "o i"],
    h: Float[Array, "i i"],
    quantize: Quantize,
    *,
    columns: int,
    damping: float,
) -> tuple[Float[Array, "o i"], Codes]:
    """Approximate W by blocks of `columns` columns, given X Xᵀ; the scale of it does not matter.

    Returns the approximation, and the codes with an axis of i / columns blocks before their own, in
    the order of the columns. λ is `damping` · mean(diag X Xᵀ); weights of dead inputs are free, and
    taken to be zero.

    Raises ValueError if blocks do not divide i. If H is not positive definite, the approximation is
    NaN: codes cannot say so, and the caller's scales should.
    """
    (o, i), c = w.shape, columns
    if c < 1 or i % c:
        raise ValueError(
            f"columns={c} must be positive and divide the input dimension of w, {w.shape=}."
        )
    dead = jnp.diag(h) == 0
    w, h = jnp.where(dead, 0, w), h + jnp.diag(dead.astype(h.dtype))
    feedback = factor(h, c, damping).reshape(i, i // c, c).swapaxes(0, 1)

    def quantize_block(errors, block):
        k, w_k, l_k = block
        approximation, codes = quantize(w_k + errors @ l_k, k)
        errors = lax.dynamic_update_slice(errors, w_k - approximation, (0, k * c))
        return errors, (approximation, codes)

    blocks = w.reshape(o, i // c, c).swapaxes(0, 1)
    steps = (jnp.arange(i // c), blocks, feedback)
    _, (parts, codes) = lax.scan(quantize_block, jnp.zeros_like(w), steps, reverse=True)
    approximation = parts.swapaxes(0, 1).reshape(o, i)
    return jnp.where(jnp.isfinite(feedback).all(), approximation, jnp.nan), codes


def factor(h: Float[Array, "i i"], columns: int, damping: float) -> Float[Array, "i i"]:
    """L - I of H + λ I = L D Lᵀ, strictly lower triangular by blocks of `columns` columns.

    With a Cholesky factor C, L is C with each block of columns times the inverse of its block on
    the diagonal. NaN where H + λ I is not positive definite.
    """
    i, c = h.shape[0], columns
    eye = jnp.eye(i, dtype=h.dtype)
    root = lax.linalg.cholesky(h + damping * jnp.mean(jnp.diag(h)) * eye, symmetrize_input=False)
    k = jnp.arange(i // c)
    diagonal = root.reshape(i // c, c, i // c, c)[k, :, k, :]
    units = jnp.broadcast_to(jnp.eye(c, dtype=h.dtype), diagonal.shape)
    inverse = solve_triangular(diagonal, units, lower=True)
    unit = jnp.einsum("ikc,kcd->ikd", root.reshape(i, i // c, c), inverse).reshape(i, i)
    later = jnp.arange(i)[:, None] // c > jnp.arange(i)[None, :] // c
    return jnp.where(later, unit, jnp.where(jnp.isfinite(unit), 0.0, jnp.nan))
