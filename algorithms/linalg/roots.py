"""Inverse p-th roots of symmetric positive definite matrices: A^(-1/p) with p = 1, 2, 3, …

    by eigenvalues   A = V Λ Vᵀ,   A^(-1/p) = V Λ^(-1/p) Vᵀ
    by products      M <- A / c,  X <- c^(-1/p) I,  and with P = ((p + 1) I - M) / p
                     X <- X P,   M <- Pᵖ M,   until M = I and X = A^(-1/p)
The second is the coupled Newton iteration (Guo, Higham, SIAM Journal on Matrix Analysis and
Applications 2006), for p = 2 that of Newton and Schulz: X is never inverted, and M says how far it
is. Eigenvalues of M below 1 grow by (1 + 1/p)ᵖ, 2.25 for p = 2, in a step, until the quadratic end,
so the number of steps goes with the logarithm of A's condition. c = ‖A‖_F 2 / (p + 1) leaves all of
them in (0, (p + 1) / 2], where it converges.

Either takes A + λ I with λ = damping · mean(diag A), as `algorithms.hessian` has it, and gives NaN
where that is not positive definite. The root itself is A^(1/p) = A (A^(-1/p))^(p-1).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from algorithms.numerics import widened


@functools.partial(jax.jit, static_argnames=("p", "damping"))
def inverse_root(
    a: Float[Array, "*batch n n"], p: int, *, damping: float = 0.0
) -> Float[Array, "*batch n n"]:
    """(A + λ I)^(-1/p) of each matrix, by its eigenvalues, in float32 or A's wider type.

    Its gradients are exact also where eigenvalues are equal, of which an eigendecomposition's are
    not numbers. Raises ValueError for a p below 1 and a negative damping.
    """
    return _inverse_root(_damped(a, p, damping), p)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _inverse_root(a: jax.Array, p: int) -> jax.Array:
    r, v = _eigenvalues(a, p)
    return (v * r[..., None, :]) @ v.mT


def _eigenvalues(a: jax.Array, p: int) -> tuple[jax.Array, jax.Array]:
    """Those of A^(-1/p), and the eigenvectors."""
    values, vectors = jnp.linalg.eigh(a)
    return jnp.where(values > 0, values, jnp.nan) ** (-1 / p), vectors


@_inverse_root.defjvp
def _inverse_root_jvp(p: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """V (D ⊙ Vᵀ dA V) Vᵀ, D_ij the divided difference of λ^(-1/p) (Daleckii, Krein). With
    r = λ^(-1/p) it is -(r_i r_j)ᵖ / Σ_k r_iᵏ r_j^(p-1-k): nothing cancels where λ_i = λ_j.
    """
    r, v = _eigenvalues(primals[0], p)
    i, j = r[..., :, None], r[..., None, :]
    divided = -((i * j) ** p) / sum(i**k * j ** (p - 1 - k) for k in range(p))
    change = v @ (divided * (v.mT @ tangents[0] @ v)) @ v.mT
    return (v * r[..., None, :]) @ v.mT, change


@functools.partial(jax.jit, static_argnames=("p", "damping", "steps"))
def newton_inverse_root(
    a: Float[Array, "*batch n n"], p: int, *, damping: float = 0.0, steps: int = 32
) -> Float[Array, "*batch n n"]:
    """(A + λ I)^(-1/p) of each matrix by products alone, which an accelerator prefers.

    NaN where `steps` are too few for the condition of A + λ I: 32 reach 1e8 for p = 2, in a type
    that holds it: at 1e6, float32 leaves a relative error of 3e-3 (`inverse_root`: 7e-2).
    Raises ValueError for a p or a number of steps below 1 and a negative damping.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    a = _damped(a, p, damping)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    c = jnp.linalg.norm(a, axis=(-2, -1), keepdims=True) * 2 / (p + 1)

    def step(state: Any, _: None) -> tuple[Any, None]:
        m, x = state
        factor = ((p + 1) * eye - m) / p
        return (jnp.linalg.matrix_power(factor, p) @ m, x @ factor), None

    (m, x), _ = lax.scan(step, (a / c, eye * c ** (-1 / p)), length=steps)
    far = jnp.max(jnp.abs(m - eye), (-2, -1), keepdims=True)
    return jnp.where(far < 0.1, x, jnp.nan)


def _damped(a: jax.Array, p: int, damping: float) -> jax.Array:
    if p < 1 or damping < 0:
        raise ValueError(f"p={p} must be at least 1, and damping={damping} not negative.")
    a = widened(a)
    mean = jnp.trace(a, axis1=-2, axis2=-1)[..., None, None] / a.shape[-1]
    return a + damping * mean * jnp.eye(a.shape[-1], dtype=a.dtype)
