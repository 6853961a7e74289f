"""NorMuon against a port of the official code, its theory, and gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.matrices import orthogonal_momentum
from algorithms.optimizers.normuon import normuon, scale_by_normuon
from tests.algorithms.optimizers import normuon_official as official
from tests.algorithms.optimizers import trajectories
from tests.algorithms.optimizers.trajectories import SHAPES, STEPS, gradient, run, start
from tests.algorithms.polar_official import newton_schulz, polar_express


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [dict(), dict(nesterov=False), dict(weight_decay=0.1, momentum=0.8, beta2=0.5)]
)
def test_steps_are_the_official_codes(x64, shape, settings):
    w = start(shape)
    found = run(normuon(0.02, **settings), w)
    expected = official.normuon(w, gradient, STEPS, lr=0.02, **settings)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("coefficients", ["jordan", "polar_express"])
def test_either_iteration(x64, coefficients):
    w = start((6, 10))
    polar = dict(jordan=newton_schulz, polar_express=polar_express)[coefficients]
    expected = official.normuon(w, gradient, STEPS, polar=polar)
    found = run(normuon(0.02, coefficients=coefficients), w)
    # polar_express's coefficients as listed agree with those computed to eight digits
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def directions(optimizer, kernel, steps=30):
    """Of independent gradients, whose neurons differ in size; the last."""
    state, update = optimizer.init(kernel), jax.jit(optimizer.update)
    for step in range(steps):
        g = jnp.asarray(np.random.default_rng(step).normal(size=kernel.shape), kernel.dtype)
        found, state = update(g * jnp.geomspace(1, 1e-3, kernel.shape[-1]), state, kernel)
    return found


def test_neurons_move_alike_where_muons_do_not():
    """And the matrix as far as Muon's. W is tall: its polar factor's rows are of any norm."""
    kernel = jnp.zeros((8, 24))
    shared = dict(coefficients="polar_express")
    muon = directions(orthogonal_momentum(**shared), kernel)
    ours = directions(scale_by_normuon(beta2=0.0, **shared), kernel) / np.sqrt(24 / 8)
    norms = [np.linalg.norm(u, axis=0) for u in (muon, ours)]
    assert norms[0].max() > 10 * norms[0].min()
    np.testing.assert_allclose(norms[1], norms[1].mean(), rtol=1e-4)
    np.testing.assert_allclose(*(np.linalg.norm(each) for each in norms), rtol=1e-4)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (3, 8, 8)])
def test_the_papers_step_has_one_root_mean_square(shape):
    found = directions(scale_by_normuon(rms=0.2), jnp.zeros(shape))
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(found**2, (-2, -1))), 0.2, rtol=1e-5)


def test_the_gradients_scale_does_not_matter(x64):
    w = start((6, 10))
    once, scaled = (run(normuon(0.02), w, scale=scale) for scale in (1.0, 1e3))
    np.testing.assert_allclose(once, scaled, rtol=1e-6, atol=1e-6)


def test_experts_are_matrices_of_their_own():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 8)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(1).normal(size=(3, 6, 8)), jnp.float32)
    optimizer = normuon(0.02)
    whole, state = optimizer.update(g, optimizer.init(kernel), kernel)
    for e in range(3):
        alone, _ = optimizer.update(g[e], optimizer.init(kernel[e]), kernel[e])
        np.testing.assert_allclose(whole[e], alone, rtol=1e-4, atol=1e-6)
    assert state[0][1].second_moment.shape == (3, 1, 8)


def test_bfloat16_parameters_have_bfloat16_updates_and_float32_moments():
    kernel = jnp.ones((4, 6), jnp.bfloat16)
    optimizer = normuon(0.02)
    updates, state = optimizer.update(kernel, optimizer.init(kernel), kernel)
    assert updates.dtype == jnp.bfloat16
    assert state[0][1].second_moment.dtype == jnp.float32


def test_it_gets_lower_than_gradient_descent_does():
    loss, w = trajectories.ill_conditioned()
    steps = 200
    ours = normuon(optax.linear_schedule(0.5, 0.0, steps))
    found = trajectories.descend(ours, w, loss, steps)
    assert found < 0.2 * trajectories.best_of_gradient_descent(loss, w, steps)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(momentum=1.0), "momentum=1.0 must be at least 0 and below 1"),
        (dict(beta2=-0.1), "beta2=-0.1 must be at least 0 and below 1"),
        (dict(rms=0.0), "rms=0.0 must be above 0"),
        (dict(coefficients="svd"), "coefficients='svd' must be"),
    ],
)
def test_bad_settings_are_named(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        normuon(0.02, **settings)


def test_vectors_are_refused():
    with pytest.raises(
        ValueError, match=r"normuon moves matrices alone, and bias has shape \(3,\)"
    ):
        normuon(0.02).init({"bias": jnp.zeros(3)})
