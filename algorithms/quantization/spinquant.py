"""SpinQuant. Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian, Blankevoort,
"SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025, arXiv:2405.16406. Notes:
papers/spinquant.md. The optimizer: Li, Li, Todorovic, ICLR 2020, arXiv:2002.01113, Alg. 1.

R on the manifold RᵀR = I, and G the loss's gradient in R. With X = Rᵀ, momentum β and step size α:
    V <- β V - Gᵀ
    Ŵ = V Xᵀ - X (Xᵀ V Xᵀ) / 2,   W = Ŵ - Ŵᵀ          skew: a direction along the manifold
    α = min(learning rate, 1 / (‖W‖₁ + ε))
    Y = X + α V, then five times Y <- X + α W (X + Y) / 2
    X <- Y,   V <- W X
The last two lines solve for the Cayley transform, Y = (I - α W / 2)⁻¹ (I + α W / 2) X, which keeps
Yᵀ Y = I; what five rounds leave open, a QR factorization closes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-8


class CayleyState(NamedTuple):
    """V of each rotation, in the coordinates of X = Rᵀ, and the steps taken."""

    momentum: Any
    steps: Array


def cayley_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.0,
    iterations: int = 5,
    retract: bool = True,
) -> optax.GradientTransformation:
    """Cayley SGD for a pytree of orthogonal matrices: what optax.apply_updates gives stays so.

    retract: close each step with a QR factorization. The official code opens one in a hundred with
    it, drawn at random, and otherwise drifts off the manifold by what `iterations` leave open.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must be at least 0 and below 1.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be positive.")

    def init(rotations: Any) -> CayleyState:
        return CayleyState(jax.tree.map(jnp.zeros_like, rotations), jnp.zeros((), jnp.int32))

    def update(gradients: Any, state: CayleyState, rotations: Any = None):
        if rotations is None:
            raise ValueError("cayley_sgd needs the rotations themselves as params of its update.")
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        one = functools.partial(
            _step, rate=rate, beta=momentum, iterations=iterations, retract=retract
        )
        stepped = jax.tree.map(one, rotations, gradients, state.momentum)
        new, v = jax.tree.transpose(jax.tree.structure(rotations), None, stepped)
        return jax.tree.map(jnp.subtract, new, rotations), CayleyState(v, state.steps + 1)

    return optax.GradientTransformation(init, update)


def _step(r: Float[Array, "n n"], g, v, *, rate, beta, iterations, retract):
    """(R, V) after one step."""
    product = functools.partial(jnp.matmul, precision="highest")
    x = (r / (jnp.linalg.norm(r, axis=1, keepdims=True) + EPSILON)).T
    v = beta * v - g.T
    half = product(v, x.T)
    half = half - product(x, product(x.T, half)) / 2
    w = half - half.T
    a = jnp.minimum(rate, 1 / (jnp.abs(w).sum(0).max() + EPSILON)).astype(r.dtype)

    def towards_cayley(_, y):
        return x + a * product(w, (x + y) / 2)

    y = lax.fori_loop(0, iterations, towards_cayley, x + a * v)
    return retraction(y).T if retract else y.T, product(w, x)


def retraction(y: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Q of Y = Q R with diag(R) > 0: Y itself where its columns are orthonormal."""
    q, upper = jnp.linalg.qr(y)
    return q * jnp.where(jnp.diag(upper) < 0, -1, 1).astype(y.dtype)


def learn_rotation(
    loss: Callable[[Float[Array, "n n"], Any, Any], Float[Array, ""]],
    rotation: Float[Array, "n n"],
    model: Any,
    batches: Any,
    optimizer: optax.GradientTransformation,
) -> tuple[Float[Array, "n n"], Float[Array, " s"]]:
    """R after a step on loss(R, model, batch) for each batch, and each batch's loss before it.

    model: a pytree that the loss reads and nothing changes. batches: a pytree of arrays [s, ...].
    """
    return _learn(rotation, model, batches, loss=loss, optimizer=optimizer)


@functools.partial(jax.jit, static_argnames=("loss", "optimizer"))
def _learn(rotation, model, batches, *, loss, optimizer):
    def step(carry, batch):
        r, state = carry
        value, gradient = jax.value_and_grad(loss)(r, model, batch)
        updates, state = optimizer.update(gradient, state, r)
        return (optax.apply_updates(r, updates), state), value

    (r, _), losses = lax.scan(step, (rotation, optimizer.init(rotation)), batches)
    return r, losses
