"""MARS against a port of the official code, what the correction is for, and AdamW."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.groups import grouped
from algorithms.optimizers.mars import correct_by_last_gradient, mars_adamw, mars_lion
from tests.algorithms.optimizers import mars_official as official
from tests.algorithms.optimizers.walks import draw, same, walk

SHAPES = {"matrix": (6, 4), "vector": (5,)}


@pytest.mark.parametrize("scale", [0.05, 1.0])  # norms below 1, and above
@pytest.mark.parametrize("kind", ["mars-adamw", "mars-lion"])
def test_is_the_official_code(x64, kind, scale):
    """Of the matrix by MARS, of the vector by AdamW, as there."""
    params, gradients = draw(SHAPES, 15, scale=scale)
    make = mars_adamw if kind == "mars-adamw" else mars_lion
    ours = grouped(
        match={"matrices": "matrix", "others": ".*"},
        matrices=make(6e-3, gamma=0.025, weight_decay=0.01),
        others=optax.adamw(3e-3, 0.9, 0.95, weight_decay=0.1),
    )
    theirs = {
        "matrix": official.Mars(params["matrix"], lr=6e-3, wd=0.01, betas=(0.95, 0.99), kind=kind),
        "vector": official.Mars(params["vector"], lr=3e-3, wd=0.1, betas=(0.9, 0.95), kind="adamw"),
    }
    expected = [{name: theirs[name].step(g[name]) for name in SHAPES} for g in gradients]
    same(walk(ours, params, gradients)[0], expected)


def corrected(gradients, gamma, b1):
    transformation = correct_by_last_gradient(gamma=gamma, b1=b1)
    state, found = transformation.init(gradients[0]), []
    for g in gradients:
        c, state = transformation.update(g, state)
        found.append(c)
    return found


def averaged(gradients, b1):
    m, found = jnp.zeros_like(gradients[0]), []
    for g in gradients:
        m = b1 * m + (1 - b1) * g
        found.append(m)
    return jnp.stack(found)


def test_at_full_strength_the_average_does_not_lag(x64):
    """γ = 1: m_t - g_t = β (m_{t-1} - g_{t-1}) = 0. Without the correction it is always behind."""
    t = jnp.arange(1, 30.0)[:, None]
    gradients = 0.01 * (
        t * jnp.array([1.0, -2.0]) + jnp.sin(t)
    )  # of small norm: nothing is clipped
    lag = [
        jnp.abs(averaged(cs, 0.9) - gradients).max()
        for cs in (corrected(gradients, 1.0, 0.9), gradients)
    ]
    assert lag[0] < 1e-12 < 0.01 < lag[1]


def test_without_correction_it_is_adamw_of_clipped_gradients(x64):
    params, gradients = draw(SHAPES, 5, scale=0.01)
    plain = optax.adamw(1e-2, 0.95, 0.99, weight_decay=0.0)
    same(walk(mars_adamw(1e-2, gamma=0.0), params, gradients)[0], walk(plain, params, gradients)[0])


def test_each_of_stacked_matrices_is_clipped_alone():
    g = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)
    g = g.at[0].multiply(1e-3)
    (c,) = corrected([g], 0.5, 0.9)
    for whole, each in zip(c, g, strict=True):
        np.testing.assert_allclose(whole, corrected([each], 0.5, 0.9)[0], rtol=1e-6)
    norms = jnp.linalg.norm(c.reshape(3, -1), axis=1)
    assert norms[0] < 0.1 and jnp.allclose(norms[1:], 1)


def test_it_is_sooner_down_than_adamw():
    """A quadratic, by the mean loss on the way: momentum of older gradients overshoots."""
    curvature = jnp.asarray([1.0, 0.1])

    def loss(p):
        return float(jnp.sum(curvature * p["p"] ** 2) / 2)

    start = {"p": np.array([0.5, 0.5])}
    slope = jax.grad(lambda p: jnp.sum(curvature * p["p"] ** 2) / 2)
    found = {}
    for gamma in (0.0, 0.025):
        steps, _ = walk(mars_adamw(0.1, gamma=gamma), start, [slope] * 80)
        found[gamma] = np.mean([loss(p) for p in steps])
    assert found[0.025] < 0.8 * found[0.0]


def test_a_bad_beta_is_named():
    with pytest.raises(ValueError, match="b1=1.0 must be at least 0 and below 1"):
        mars_adamw(1e-3, b1=1.0)
