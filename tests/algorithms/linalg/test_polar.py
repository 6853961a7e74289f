"""The polar factor against an SVD in float64 and a port of the official iterations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.linalg import frobenius_norm, polar_express, polar_factor, quintics
from tests.algorithms import polar_official as official

BANDS = {"jordan": (2e-3, 0.68, 1.21), "polar_express": (1e-3, 0.84, 1.13)}  # as documented


def matrix(m, n, smallest=1e-3, seed=0):
    """Singular values from 1 down to `smallest`, evenly in their logarithm, then ‖·‖_F = 1."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.normal(size=(m, n)), full_matrices=False)
    s = np.geomspace(1, smallest, min(m, n))
    return (u * s) @ vt / np.linalg.norm(s)


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_singular_values_come_into_the_band_and_vectors_stay(x64, name, shape):
    lowest, low, high = BANDS[name]
    x = matrix(*shape, smallest=lowest * 2)  # above the lowest, once ‖x‖_F = 1
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    assert s.min() > lowest / 2
    found = np.asarray(polar_factor(jnp.asarray(x), name))
    values = np.einsum("mi,mn,in->i", u, found, vt)
    np.testing.assert_allclose((u * values) @ vt, found, atol=1e-9)
    inside = s > lowest
    assert low < values[inside].min() and values.max() < high
    room = 1.01 if name == "polar_express" else 1.0
    s = s / (room + 1e-7)
    np.testing.assert_allclose(values, official.composed(theirs(name), s), rtol=1e-7)


def theirs(name):
    if name == "jordan":
        return official.JORDAN
    listed = official.optimal_composition(1e-3, 8, cushion=0.02407327424182761)
    return [tuple(np.array(p) / 1.01 ** np.array([1, 3, 5])) for p in listed[:5]]


@pytest.mark.parametrize("steps", [1, 5, 8, 9])
def test_steps_are_the_official_codes(x64, steps):
    x = matrix(9, 14)
    found = polar_factor(jnp.asarray(x), polar_express(steps))
    np.testing.assert_allclose(found, official.polar_express(x, steps), rtol=1e-6, atol=1e-8)


def test_eight_steps_give_the_polar_factor(x64):
    x = matrix(14, 9, smallest=5e-3)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(polar_factor(jnp.asarray(x), polar_express(8)), u @ vt, atol=1e-9)


def test_a_batch_is_its_matrices_one_by_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6, 4)), jnp.float32)
    found = polar_factor(x)
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(found[i, j], polar_factor(x[i, j]), atol=1e-5)


def test_directions_of_no_rank_stay_zero(x64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(10, 3)) @ rng.normal(size=(3, 8))
    found = np.linalg.svd(np.asarray(polar_factor(jnp.asarray(x))), compute_uv=False)
    assert found[:3].min() > 0.84 and found[3:].max() < 1e-9


def test_zeros_give_zeros():
    np.testing.assert_array_equal(polar_factor(jnp.zeros((4, 6))), 0)


@pytest.mark.parametrize("name", BANDS)
def test_bfloat16_products_come_near(name):
    x = jnp.asarray(matrix(24, 40, smallest=0.05), jnp.float32)
    found = polar_factor(x, name, dtype=jnp.bfloat16)
    assert found.dtype == x.dtype
    apart = jnp.linalg.norm(found - polar_factor(x, name)) / jnp.sqrt(24)
    assert 0.001 < apart < 0.1
    assert polar_factor(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_graph_does_not_grow():
    def operations(n):
        return str(jax.make_jaxpr(polar_factor)(jnp.zeros((2, n, 2 * n)))).count("=")

    assert operations(4) == operations(64)


def test_steps_of_ones_own():
    found = polar_factor(jnp.eye(3), [[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(found, np.eye(3) / np.sqrt(3), rtol=1e-5)


@pytest.mark.parametrize("wrong", ["newton", [], [[1.0, 2.0]]])
def test_other_coefficients_are_refused(wrong):
    with pytest.raises(ValueError, match="must be 'jordan', 'polar_express' or three numbers"):
        quintics(wrong)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        polar_express(0)


def test_norms_are_of_each_matrix_in_float32():
    x = jnp.stack([jnp.full((300, 4), 1.0), jnp.full((300, 4), 2.0)]).astype(jnp.bfloat16)
    found = frobenius_norm(x)
    assert found.shape == (2, 1, 1) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[:, 0, 0], np.sqrt(1200) * np.array([1, 2]), rtol=1e-6)
