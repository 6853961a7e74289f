"""Entropic optimal transport by Sinkhorn's iterations on logarithms.

Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv:1306.0895. To move masses a [n] to masses b [m] at
costs C [n, m],
    P = argmin_{P ≥ 0, P 1 = a, Pᵀ 1 = b}  ⟨P, C⟩ - ε H(P),   H(P) = -Σ P_ij (log P_ij - 1)
has the form P_ij = exp((f_i + g_j - C_ij) / ε), and each half of a step makes one margin right:
    f_i <- ε log a_i - ε log Σ_j exp((g_j - C_ij) / ε),     g_j the same of columns.
On logarithms nothing underflows, however small ε is; the smaller, the nearer P is to a plan of
least cost, and the more steps it takes.

Derivatives are those of the solution, by the implicit function theorem: P's margins stay as they
are, a linear system in f and g that conjugate gradients solve. No step is kept in memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, Int

from algorithms.numerics import widened


class Transport(NamedTuple):
    """A plan, its potentials, and how far its rows are from a; its columns sum to b."""

    plan: Float[Array, "*batch n m"]
    f: Float[Array, "*batch n"]
    g: Float[Array, "*batch m"]
    error: Float[Array, "*batch"]  # Σ_i |(P 1)_i - a_i|; above the tolerance, steps were too few
    steps: Int[Array, "*batch"]


def sinkhorn(
    cost: Float[Array, "*batch n m"],
    a: Float[Array, "*#batch n"] | None = None,
    b: Float[Array, "*#batch m"] | None = None,
    *,
    epsilon: float,
    tolerance: float = 1e-3,
    steps: int = 2000,
) -> Transport:
    """The plan of each problem of a batch, until its margins are within `tolerance`.

    a, b: masses, each summing to 1; None for equal ones. One of zero is served by nothing.
    epsilon: ε, in the unit of the costs. steps: the most that are taken.

    Differentiable in the costs and, where sums of masses stay 1, in the masses. Computed in float32
    or the costs' wider type; the error that float32 reaches is about 1e-7 max(C) / ε.

    Raises ValueError for an epsilon, tolerance or number of steps that means nothing.
    """
    if epsilon <= 0 or tolerance <= 0 or steps < 1:
        raise ValueError(
            f"epsilon={epsilon} and tolerance={tolerance} must be positive, steps={steps} at least "
            "1."
        )
    cost = widened(cost)
    n, m = cost.shape[-2:]
    a = jnp.full(n, 1 / n, cost.dtype) if a is None else a.astype(cost.dtype)
    b = jnp.full(m, 1 / m, cost.dtype) if b is None else b.astype(cost.dtype)
    return _each(cost, a, b, epsilon, tolerance, steps)


@functools.partial(jax.jit, static_argnames=("steps",))
def _each(cost: Any, a: Any, b: Any, epsilon: Any, tolerance: Any, steps: int) -> Transport:
    def one(cost: jax.Array, a: jax.Array, b: jax.Array) -> Transport:
        return _solved(cost / epsilon, a, b, epsilon, tolerance, steps)

    return Transport(
        *jnp.vectorize(one, signature="(n,m),(n),(m)->(n,m),(n),(m),(),()")(cost, a, b)
    )


def _solved(c: Any, a: Any, b: Any, epsilon: Any, tolerance: Any, steps: int) -> Transport:
    """Of costs and potentials in units of ε."""

    def plan(potentials: Any) -> jax.Array:
        return jnp.exp(potentials[0][:, None] + potentials[1] - c)

    def excess(potentials: Any) -> Any:
        p = plan(potentials)
        return p.sum(1) - a, p.sum(0) - b

    def tangent(jacobian: Any, rhs: Any) -> Any:
        return _solve_margins(jacobian, rhs, a, b)

    start = jnp.zeros_like(a), jnp.zeros_like(b)
    potentials, (error, taken) = lax.custom_root(
        excess, start, lambda _, start: _iterated(c, a, b, start, tolerance, steps), tangent,
        has_aux=True,
    )  # fmt: skip
    shift = jnp.sum(jnp.where(b > 0, b * potentials[1], 0))  # P is that of f + s, g - s for any s
    f, g = potentials[0] + shift, potentials[1] - shift
    return Transport(plan((f, g)), epsilon * f, epsilon * g, error, taken)


def _iterated(c: Any, a: Any, b: Any, start: Any, tolerance: Any, steps: int) -> Any:
    """Potentials, and the error and the number of steps beside them."""

    def rows(g: jax.Array) -> jax.Array:
        return jnp.log(a) - jax.nn.logsumexp(g - c, 1)

    def going_on(state: Any) -> jax.Array:
        *_, error, step = state
        return (error > tolerance) & (step < steps)

    def step(state: Any) -> Any:
        _, _, f, _, step = state
        g = jnp.log(b) - jax.nn.logsumexp(f[:, None] - c, 0)
        after = rows(g)  # what would make the rows right says how far off they are
        error = jnp.sum(jnp.where(a > 0, a * jnp.abs(jnp.expm1(f - after)), 0))
        return f, g, after, error, step + 1

    f, g = start
    state = f, g, rows(g), jnp.full_like(a[0], jnp.inf), 0
    f, g, _, error, taken = lax.while_loop(going_on, step, state)
    return (f, g), (error, taken)


def _solve_margins(jacobian: Any, rhs: Any, a: Any, b: Any) -> Any:
    """J x = rhs, J = [[diag a, P], [Pᵀ, diag b]]: symmetric, semidefinite, and (1, -1) is mapped to
    zero, so that part of the right side, by which sums of masses would change, is left out.
    """
    off = (rhs[0].sum() - rhs[1].sum()) / (a.size + b.size)
    scale = jax.tree.map(lambda x: jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0), (a, b))
    tolerance = float(jnp.finfo(a.dtype).eps) ** 0.75

    def solve(matvec: Any, rhs: Any) -> Any:
        return cg(
            matvec, rhs, tol=tolerance, maxiter=a.size + b.size,
            M=lambda x: jax.tree.map(jnp.multiply, scale, x),
        )[0]  # fmt: skip

    # `cg` alone can be solved with in its transpose, but not be transposed inside `custom_root`
    return lax.custom_linear_solve(jacobian, (rhs[0] - off, rhs[1] + off), solve, symmetric=True)
