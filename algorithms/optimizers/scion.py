"""Scion. Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls, Cevher, ICML 2025, arXiv:2502.07529.

A step goes to where a linear function is least on a ball around zero of radius ρ, whose norm the
kind of layer decides (Alg. 1 and 2). With d an average of gradients, and lmo(d) here the point of
the unit ball where <d, ·> is greatest:
    d <- (1 - α) d + α G
    unconstrained  W <- W - γ ρ lmo(d)
    constrained    W <- (1 - γ) W - γ ρ lmo(d)      stays in the ball, for γ <= 1 (Frank and Wolfe)

Norms of W [out, in], after the official code's names; a kernel [in, out] is its transpose, and so
is a table of embeddings [tokens, out], whose tokens are inputs:
    spectral  √(in/out) ‖W‖₂                  lmo √(out/in) U Vᵀ                 blocks
    col_norm  greatest rms of an input's out  lmo each input's, over its rms      embeddings
    sign      in · greatest |W|               lmo sign / in                       head
    row_norm  greatest √in ‖·‖₂ of an output  lmo each output's, over √in ‖·‖₂    head
    rms       root mean square                lmo d, over its rms                 norms, biases
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from algorithms.linalg import polar_factor, quintics

LMO = Callable[[Float[Array, "..."]], Float[Array, "..."]]
EPSILON = 1e-8


def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    norm: LMO,
    radius: float = 1.0,
    momentum: float = 0.1,
    constrained: bool = True,
) -> optax.GradientTransformation:
    """Scion for layers of one kind. learning_rate: γ. radius: ρ. momentum: α, a gradient's weight.

    norm: `spectral()`, `col_norm`, `sign`, `row_norm`, `rms`, or any lmo of one's own.
    """
    return optax.chain(
        scale_by_scion(norm=norm, radius=radius, momentum=momentum),
        optax.add_decayed_weights(1.0) if constrained else optax.identity(),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_scion(
    *, norm: LMO, radius: float = 1.0, momentum: float = 0.1
) -> optax.GradientTransformation:
    """ρ lmo(d). The average has the parameters' dtype."""
    if not 0 < momentum <= 1:
        raise ValueError(
            f"momentum={momentum} must be above 0 and at most 1: it is what a new gradient weighs."
        )
    if radius <= 0:
        raise ValueError(f"radius={radius} must be above 0.")
    return optax.chain(
        optax.ema(1 - momentum, debias=False),
        optax.stateless(lambda d, _: jax.tree.map(lambda x: radius * norm(x), d)),
    )


def spectral(*, coefficients: str | Sequence[Sequence[float]] = "jordan") -> LMO:
    """Of layers between features; the polar factor is near to U Vᵀ (`algorithms.linalg`)."""
    steps = quintics(coefficients)

    def lmo(d: Float[Array, "..."]) -> Float[Array, "..."]:
        inputs, outputs = _matrix(d, "spectral")
        return math.sqrt(outputs / inputs) * polar_factor(d, steps)

    return lmo


def col_norm(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of layers whose input is one-hot: each input's outputs have a root mean square of one."""
    _matrix(d, "col_norm")
    return d / (jnp.sqrt(jnp.mean(d**2, axis=-1, keepdims=True)) + EPSILON)


def row_norm(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of the last layer: no output is above one, for inputs whose root mean square is one."""
    inputs, _ = _matrix(d, "row_norm")
    return d / (math.sqrt(inputs) * jnp.linalg.norm(d, axis=-2, keepdims=True) + EPSILON)


def sign(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of the last layer: no output is above one, for inputs of at most one."""
    inputs, _ = _matrix(d, "sign")
    return jnp.sign(d) / inputs


def rms(d: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of vectors."""
    return d / (jnp.sqrt(jnp.mean(d**2, axis=-1, keepdims=True)) + EPSILON)


def _matrix(d: Float[Array, "..."], name: str) -> tuple[int, int]:
    if d.ndim < 2:
        raise ValueError(f"norm={name} is of matrices, and an update has shape {d.shape}: try rms.")
    return d.shape[-2], d.shape[-1]
