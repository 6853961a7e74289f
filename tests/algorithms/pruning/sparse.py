"""Sparse training of one or several matrices towards random aims."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def weights(shapes, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def begun(optimizer, params):
    """The state, and the parameters that it begins with."""
    from algorithms.optimizers.evaluation import start_params

    state = optimizer.init(params)
    return start_params(state, params), state


def aims(params, step):
    rng = np.random.default_rng(1000 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def steps(optimizer, params, count):
    """(parameters, masks, the dense gradient and the state before, the state) of each step."""
    params, state = begun(optimizer, params)

    @jax.jit
    def step(params, state, aim):
        gradients = jax.tree.map(jnp.subtract, params, aim)
        updates, later = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), later, gradients

    for n in range(count):
        before = state
        params, state, gradients = step(params, state, aims(params, n))
        yield params, state.masks.alive, gradients, before, state
    assert step._cache_size() == 1  # whether masks move or not
