"""Streams of gradients and a matrix's quadratic, for optimizers with curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.algorithms.test_block_ldlq import equations


def gradients(shape, steps, seed=0):
    """[steps, *shape]: noise that is correlated along both sides, around a mean."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(steps, *shape))
    for axis in range(1, noise.ndim):
        d = noise.shape[axis]
        mix = rng.normal(size=(d, d)) * np.logspace(0, -1, d)
        noise = np.moveaxis(np.tensordot(noise, mix, axes=(axis, 0)), -1, axis)
    return noise + rng.normal(size=shape)


def updates(optimizer, grads):
    """What a transformation makes of gradients [steps, ...] (a pytree), and its last state."""
    grads = jax.tree.map(jnp.asarray, grads)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)

    @jax.jit
    def run(params, grads):
        def step(state, g):
            update, state = optimizer.update(g, state, params)
            return state, update

        state, found = jax.lax.scan(step, optimizer.init(params), grads)
        return found, state

    found, state = run(params, grads)
    return jax.tree.map(np.asarray, found), state


def program(optimizer, shape):
    """The number of equations of an update's graph."""
    w = jnp.zeros(shape)
    return equations(jax.make_jaxpr(optimizer.update)(w, optimizer.init(w), w).jaxpr)


def orthogonal(d, rng):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def distances(make, rates, *, shape=(12, 8), steps=150, condition=1e3, seed=0):
    """Of ½ ‖A (W - W*) B‖², AᵀA and BᵀB of that condition, in turned axes: the least that any of
    the learning rates, falling to zero, leaves of it, as a fraction."""
    rng = np.random.default_rng(seed)
    a, b = (
        orthogonal(d, rng) * np.logspace(0, -np.log10(condition) / 2, d) @ orthogonal(d, rng)
        for d in shape
    )
    aim = rng.normal(size=shape)

    def value(w):
        return jnp.sum((a @ (w - aim) @ b) ** 2) / 2

    @jax.jit
    def left(rate):
        optimizer = make(optax.linear_schedule(rate, 0.0, steps))

        def step(carry, _):
            w, state = carry
            update, state = optimizer.update(jax.grad(value)(w), state, w)
            return (optax.apply_updates(w, update), state), None

        w = jnp.zeros(shape)
        (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), length=steps)
        return value(w) / value(jnp.zeros(shape))

    return min(float(left(rate)) for rate in rates)
