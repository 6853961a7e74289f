"""A small layer that is learned: its data, its loss and descents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from algorithms import surgery
from algorithms.modules import CompressedLinear


def layer(seed=0, o=6, i=32, n=50):
    """W [o, i], X [n, i] with correlated channels, and X Wᵀ."""
    rng = np.random.default_rng(seed)
    w, x = rng.normal(size=(o, i)), rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) / np.sqrt(i)
    return w, x, x @ w.T


def dense(w):
    return surgery.linear(jnp.asarray(w))


def quantized(w, format):
    """Packed on a grid that w itself would not give: some codes at the ends of groups go unused."""
    w = jnp.asarray(w, jnp.float32)
    return CompressedLinear(format.round(0.6 * w, format.fit(w)))


def loss(made, x, y):
    return jnp.mean((made(x) - y) ** 2)


def gradients(made, x, y):
    return nnx.grad(loss)(made, x, y)


def updated(made, x, y, rate):
    """One step of gradient descent, in place; the gradients."""
    found = gradients(made, x, y)
    nnx.update(made, jax.tree.map(lambda p, g: p - rate * g, nnx.state(made, nnx.Param), found))
    return found


def fit(made, x, y, rate=3e-3, steps=300, only=nnx.Param):
    """The loss before and after so many steps of Adam, its rate falling to zero; only: a filter of
    the parameters that move.
    """
    graph, state, others = nnx.split(made, only, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(carry, _):
        def of(state):
            model = nnx.merge(graph, state, carry[1], copy=True)
            value = loss(model, x, y)
            return value, nnx.split(model, only, ...)[2]

        (value, others), g = jax.value_and_grad(of, has_aux=True)(carry[0])
        updates, moved = optimizer.update(g, carry[2], carry[0])
        return (optax.apply_updates(carry[0], updates), others, moved), value

    carry = state, others, optimizer.init(state)
    (state, others, _), losses = jax.lax.scan(step, carry, length=steps)
    nnx.update(made, state, others)
    return float(losses[0]), float(loss(made, x, y))
