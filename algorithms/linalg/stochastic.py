"""The spectrum of a matrix of which only products are known: density, trace, diagonal.

Stochastic Lanczos quadrature, as Ghorbani, Krishnan, Xiao, ICML 2019, arXiv:1901.10159, look at the
Hessian of a network's loss with it. For random starts of norm 1, i = 1 … probes,
    φ(t) ≈ 1/probes Σ_i Σ_j ω_ij N(t; θ_ij, σ²),   θ, ω: nodes and weights of k steps of Lanczos
and for signs z, independent and ±1 alike (Hutchinson, Communications in Statistics 1990; Bekas,
Kokiopoulou, Saad, Applied Numerical Mathematics 2007):
    E zᵀ A z = tr A,   E z ⊙ A z = diag A.

Where this differs from the official code (github.com/google/spectral-density): 1. Steps are a scan,
so the graph has one product, not k. 2. Where Lanczos breaks down it stops, in place of dividing by
rounding. 3. σ is given in the eigenvalues' own unit; they multiply their `sigma_squared` by the
spectrum's width, if that is above 1. 4. The density is not scaled to sum to 1 on the grid: a grid
that misses a part of the spectrum shows as less.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from algorithms.linalg.krylov import MatVec, lanczos, quadrature
from algorithms.numerics import widened


class Spectrum(NamedTuple):
    """Nodes and weights of each probe's rule; of each probe the weights sum to 1."""

    nodes: Float[Array, "probes k"]
    weights: Float[Array, "probes k"]


class Estimate(NamedTuple):
    """A mean over probes and its standard error, both of one structure."""

    mean: Any
    standard_error: Any


def spectrum(
    key: Key[Array, ""], matvec: MatVec, like: Any, *, probes: int = 8, steps: int = 64
) -> Spectrum:
    """Of a symmetric A that takes and gives pytrees like `like`; probes · steps products.

    Memory is one probe's: k times the size of `like`. Jit its caller. Raises ValueError for no
    probes and for what `lanczos` refuses.
    """
    _require(probes, 1)

    def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quadrature(lanczos(matvec, _random(key, like, jax.random.normal), steps))

    return Spectrum(*lax.map(probe, jax.random.split(key, probes)))


def density(
    found: Spectrum, grid: Float[Array, " t"], deviation: float | Float[Array, ""]
) -> Float[Array, " t"]:
    """φ on a grid, each node widened to a normal distribution with σ = `deviation`."""

    def at(t: jax.Array) -> jax.Array:
        return jnp.sum(found.weights * jax.scipy.stats.norm.pdf(t, found.nodes, deviation))

    return lax.map(at, grid) / len(found.nodes)


def trace(key: Key[Array, ""], matvec: MatVec, like: Any, *, probes: int = 32) -> Estimate:
    """tr A; exact for a diagonal A. Raises ValueError for fewer than two probes."""
    _require(probes, 2)

    def probe(key: jax.Array) -> jax.Array:
        return jnp.sum(ravel_pytree(_signed_product(key, matvec, like))[0])

    found = lax.map(probe, jax.random.split(key, probes))
    return Estimate(found.mean(), found.std(ddof=1) / jnp.sqrt(probes))


def diagonal(key: Key[Array, ""], matvec: MatVec, like: Any, *, probes: int = 32) -> Estimate:
    """diag A, a pytree like `like`; exact for a diagonal A. Memory does not grow with probes.

    Raises ValueError for fewer than two probes.
    """
    _require(probes, 2)

    def probe(state: Any, numbered: Any) -> tuple[Any, None]:
        mean, squares = state
        count, key = numbered
        found = _signed_product(key, matvec, like)
        after = jax.tree.map(lambda m, x: m + (x - m) / count, mean, found)
        squares = jax.tree.map(  # Welford: squares of differences do not cancel
            lambda s, x, m, n: s + (x - m) * (x - n), squares, found, mean, after
        )
        return (after, squares), None

    zeros = jax.tree.map(lambda x: jnp.zeros_like(widened(x)), like)
    numbered = (jnp.arange(1, probes + 1), jax.random.split(key, probes))
    (mean, squares), _ = lax.scan(probe, (zeros, zeros), numbered)
    return Estimate(mean, jax.tree.map(lambda s: jnp.sqrt(s / (probes * (probes - 1))), squares))


def _signed_product(key: jax.Array, matvec: MatVec, like: Any) -> Any:
    """z ⊙ A z."""
    z = _random(key, like, jax.random.rademacher)
    return jax.tree.map(lambda z, a: z * a.astype(z.dtype), z, matvec(z))


def _random(key: jax.Array, like: Any, draw: Any) -> Any:
    flat, unravel = ravel_pytree(jax.tree.map(lambda x: jnp.zeros_like(widened(x)), like))
    return unravel(draw(key, flat.shape, flat.dtype))


def _require(probes: int, least: int) -> None:
    if probes < least:
        raise ValueError(f"probes={probes} must be at least {least}.")
