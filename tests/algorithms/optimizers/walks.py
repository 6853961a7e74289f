"""Optimizers along given gradients, for comparison with ports of official code."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def draw(shapes, steps, seed=0, scale=1.0):
    """Parameters by name, and that many gradients of them, in float64."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [
        {name: scale * rng.normal(size=shape) for name, shape in shapes.items()}
        for _ in range(steps)
    ]
    return params, gradients


def walk(optimizer, params, gradients, dtype=None):
    """The parameters after each step, and the last state. A gradient may be a function of them."""
    optimizer = optax.with_extra_args_support(optimizer)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    state, seen = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        g = gradient(params) if callable(gradient) else gradient
        g = jax.tree.map(lambda x, p: jnp.asarray(x, p.dtype), g, params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen, state


def same(found, expected, rtol=1e-10):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        for a, b in zip(jax.tree.leaves(f), jax.tree.leaves(e), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)
