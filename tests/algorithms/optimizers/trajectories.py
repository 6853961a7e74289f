"""Steps of an optimizer of matrices, beside those of the ports of official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPES = [(6, 10), (10, 6), (8, 8)]  # W [out, in]
STEPS = 12


def start(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def gradient(w, step):
    """Of ‖(W - A) D‖² / 2 with D = diag(1 .. 1/4), and noise of the step: W [out, in]."""
    aim = np.random.default_rng(100).normal(size=w.shape)
    noise = np.random.default_rng(step).normal(size=w.shape)
    return (w - aim) * np.linspace(1, 0.25, w.shape[1]) ** 2 + 0.3 * noise


def run(optimizer, w, *, steps=STEPS, scale=1.0, dtype=None):
    """W [out, in] after each step; the optimizer sees a kernel [in, out]."""
    params = {"kernel": jnp.asarray(w.T, dtype)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    found = []
    for step in range(steps):
        g = gradient(np.asarray(params["kernel"], np.float64).T, step) * scale
        grads = {"kernel": jnp.asarray(g.T, params["kernel"].dtype)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(np.asarray(params["kernel"], np.float64).T)
    return found


def descend(optimizer, w, loss, steps):
    """The loss after steps down its gradient; `loss` of a kernel [in, out]."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), None, steps)
    return loss(params)


def ill_conditioned(inputs=24, outputs=16):
    """The squared error of a layer whose inputs differ in energy 10,000 fold, and a start."""
    rng = np.random.default_rng(7)
    energy = jnp.geomspace(1, 1e-4, inputs)
    aim = jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)
    start = jnp.zeros((inputs, outputs), jnp.float32)
    return (lambda w: 0.5 * jnp.sum(energy[:, None] * (w - aim) ** 2)), start


def best_of_gradient_descent(loss, start, steps):
    """Over learning rates up to where it diverges, with momentum and without."""

    def lost(rate, momentum):
        return descend(optax.sgd(rate, momentum), start, loss, steps)

    rates = jnp.asarray([0.1, 0.3, 1.0, 1.9, 3.0, 3.8])
    return jnp.nanmin(jax.vmap(lambda rate: jnp.stack([lost(rate, 0.0), lost(rate, 0.9)]))(rates))
