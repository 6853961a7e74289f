"""Products with the second derivatives of a loss, which are never formed.

Pearlmutter, Neural Computation 1994; Schraudolph, Neural Computation 2002. For a loss ℓ(θ), and for
ℓ(θ) = L(f(θ)) with J the Jacobian of f and H_L the Hessian of L in the outputs:
    H v = d/dt ∇ℓ(θ + t v),        forward over reverse: twice to three times a gradient
    G v = Jᵀ H_L J v,              without the second derivatives of f
G is positive semidefinite where L is convex in the outputs, and equals H where f is linear; of a
likelihood whose outputs are its natural parameters (cross entropy of logits, squared error) it is
the Fisher information. Both are linear maps of pytrees like θ, for `lanczos`, `spectrum`, `trace`,
and, with λ v added, for `jax.scipy.sparse.linalg.cg`.

The linearization is made once, when the product is: make it inside what is jitted, so that its
products share it.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from algorithms.linalg.krylov import MatVec


def hessian_product(loss: Callable[[Any], Float[Array, ""]], params: Any) -> MatVec:
    """v -> H v at `params`, v in any floating type."""
    _, product = jax.linearize(jax.grad(loss), params)
    return lambda v: product(_like(v, params))


def gauss_newton_product(
    model: Callable[[Any], Any], loss: Callable[[Any], Float[Array, ""]], params: Any
) -> MatVec:
    """v -> G v at `params` of loss(model(params)); model's outputs may be any pytree.

    Forward derivatives go through the model, which no `jax.custom_vjp` within it allows.
    """
    outputs, push = jax.linearize(model, params)
    _, curve = jax.linearize(jax.grad(loss), outputs)
    pull = jax.linear_transpose(push, params)
    return lambda v: pull(curve(push(_like(v, params))))[0]


def _like(v: Any, params: Any) -> Any:
    return jax.tree.map(lambda a, p: a.astype(p.dtype), v, params)
