"""Hyperball against a port of the authors' code, its theory, and its optimizer alone."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algorithms.optimizers.hyperball import hyperball
from algorithms.optimizers.matrices import orthogonal_momentum
from tests.algorithms.optimizers import hyperball_official as official
from tests.algorithms.optimizers.trajectories import SHAPES, STEPS, descend, gradient, run, start


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_adam_are_the_authors_codes(x64, shape):
    w = start(shape)
    found = run(hyperball(optax.scale_by_adam(), 0.05), w)
    expected = official.adamh(w, gradient, STEPS, lr=0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_of_muon_are_the_authors_codes(x64, shape):
    w = start(shape)
    found = run(hyperball(orthogonal_momentum(coefficients="jordan"), 0.05), w)
    expected = official.muonh(w, gradient, STEPS, lr=0.05)
    # epsilon, beside a norm, is 1e-8 in their iteration and 1e-7 in ours, of an average
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


INNER = {
    "adam": optax.scale_by_adam(),
    "momentum": optax.trace(0.9),
    "orthogonal": orthogonal_momentum(),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("dtype, rounding", [(jnp.float32, 3e-7), (jnp.bfloat16, 2e-3)])
def test_norms_stay_for_hundreds_of_steps(name, dtype, rounding):
    w = start((6, 10))
    found = run(hyperball(INNER[name], 0.02), w, steps=300, dtype=dtype)
    before = np.linalg.norm(np.asarray(jnp.asarray(w, dtype), np.float64))
    after = [np.linalg.norm(each) for each in found]
    np.testing.assert_allclose(after, before, rtol=rounding)


def test_the_learning_rate_is_the_tangent_of_a_step(x64):
    """Of an update at a right angle to W, to which gradients of what ignores W's norm are."""
    w = start((6, 10))
    u = start((6, 10), seed=1)
    u = u - w * np.sum(u * w) / np.sum(w * w)
    optimizer = hyperball(optax.identity(), 0.1)
    updates, _ = optimizer.update(jnp.asarray(u), optimizer.init(jnp.asarray(w)), jnp.asarray(w))
    moved = w + np.asarray(updates)
    cosine = np.sum(w * moved) / np.linalg.norm(w) / np.linalg.norm(moved)
    np.testing.assert_allclose(np.tan(np.arccos(cosine)), 0.1, rtol=1e-9)


@pytest.mark.parametrize("name", INNER)
def test_the_gradients_scale_does_not_matter(x64, name):
    optimizer = hyperball(INNER[name], 0.02)
    once, scaled = (run(optimizer, start((6, 10)), scale=scale) for scale in (1.0, 1e3))
    np.testing.assert_allclose(once, scaled, rtol=1e-6, atol=1e-6)


def test_experts_are_on_spheres_of_their_own():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(
        rng.normal(size=(3, 6, 8)) * np.array([1, 2, 3])[:, None, None], jnp.float32
    )
    g = jnp.asarray(rng.normal(size=(3, 6, 8)), jnp.float32)
    optimizer = hyperball(optax.scale_by_adam(), 0.1)
    whole, _ = optimizer.update(g, optimizer.init(kernel), kernel)
    for e in range(3):
        alone, _ = optimizer.update(g[e], optimizer.init(kernel[e]), kernel[e])
        np.testing.assert_allclose(whole[e], alone, rtol=1e-5, atol=1e-6)


def test_gradients_of_zero_leave_a_matrix():
    kernel = jnp.asarray(start((6, 10)), jnp.float32)
    optimizer = hyperball(optax.trace(0.9), 0.1)
    updates, _ = optimizer.update(jnp.zeros_like(kernel), optimizer.init(kernel), kernel)
    np.testing.assert_allclose(updates, 0, atol=1e-6)


def test_a_matrix_of_zeros_stays():
    kernel = jnp.zeros((3, 4))
    optimizer = hyperball(optax.trace(0.9), 0.1)
    updates, _ = optimizer.update(jnp.ones((3, 4)), optimizer.init(kernel), kernel)
    np.testing.assert_array_equal(updates, 0)


def test_a_matrix_too_large_is_no_hindrance():
    """Where the loss ignores norms, Adam's steps are small beside a large W; these are not."""
    rng = np.random.default_rng(0)
    aim = jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    aim = aim / jnp.linalg.norm(aim)
    w = 30 * jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)

    def loss(w):
        return jnp.sum((w / jnp.linalg.norm(w) - aim) ** 2)

    steps = 100
    rate = optax.linear_schedule(0.05, 0.0, steps)
    alone = min(descend(optax.adam(scale * 0.05), w, loss, steps) for scale in (1, 4, 16))
    assert descend(hyperball(optax.scale_by_adam(), rate), w, loss, steps) < 0.1 * alone


def test_parameters_are_needed():
    kernel = jnp.ones((3, 4))
    optimizer = hyperball(optax.trace(0.9), 0.1)
    with pytest.raises(ValueError, match="params=None must be the parameters"):
        optimizer.update(kernel, optimizer.init(kernel))


def test_vectors_are_refused():
    with pytest.raises(
        ValueError, match=r"hyperball moves matrices alone, and bias has shape \(3,\)"
    ):
        hyperball(optax.scale_by_adam(), 0.1).init({"bias": jnp.zeros(3)})
