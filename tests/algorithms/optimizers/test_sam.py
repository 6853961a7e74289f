"""SAM against its paper's two lines, in a flat and a sharp valley, and where optax's own stops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.sam import sam


def run(optimizer, loss, params, steps):
    grad = jax.grad(loss)
    state = optimizer.init(params)
    seen = []
    for _ in range(steps):
        updates, state = optimizer.update(
            grad(params), state, params, grad_fn=lambda p, _: grad(p), value=loss(params)
        )
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def test_is_the_papers_update(x64):
    """github.com/davda54/sam has the same two lines, with 1e-12 beside the norm."""
    curvature = jnp.asarray([1.0, 5.0, 0.1])
    start = jnp.asarray([1.0, -2.0, 3.0])
    found = run(sam(optax.sgd(0.1), radius=0.3), lambda p: jnp.sum(curvature * p**2) / 2, start, 12)
    p = np.asarray(start)
    for step in found:
        g = curvature * p
        p = p - 0.1 * curvature * (p + 0.3 * g / (np.linalg.norm(g) + 1e-12))
        np.testing.assert_allclose(step, p, rtol=1e-12)


def test_it_leaves_a_sharp_minimum_for_where_its_neighbourhood_is_low():
    """A dip of width 0.05 in a wide valley: the highest loss within ρ, where each comes to rest."""

    def loss(p):
        return p**2 / 4 - jnp.exp(-(((p - 1) / 0.05) ** 2)) / 10

    def worst(p):
        return float(loss(p + jnp.linspace(-0.2, 0.2, 101)).max())

    start = jnp.asarray(1.02)
    sgd, ours = (run(o, loss, start, 400)[-1] for o in (sgd_like(0.0), sgd_like(0.2)))
    assert loss(sgd) < loss(ours)
    assert worst(ours) < 0.7 * worst(sgd)


def sgd_like(radius):
    inner = optax.sgd(0.02)
    return sam(inner, radius=radius) if radius else optax.with_extra_args_support(inner)


def test_a_gradient_of_zero_is_no_step():
    optimizer, p = sam(optax.sgd(0.1)), jnp.ones(3)
    updates, _ = optimizer.update(jnp.zeros(3), optimizer.init(p), p, grad_fn=lambda p, _: 0 * p)
    assert (updates == 0).all()


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="radius=0.0 must be above 0"):
        sam(optax.sgd(0.1), radius=0.0)
    with pytest.raises(ValueError, match="grad_fn must be provided"):
        optimizer = sam(optax.sgd(0.1))
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
