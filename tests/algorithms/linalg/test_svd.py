"""Randomized factorizations against LAPACK's, scikit-learn's and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from algorithms.linalg import pca, randomized_eigh, randomized_svd
from tests.algorithms.test_clustering import equations

KEY = jax.random.key(0)


def matrix(m, n, decay, seed=0):
    """Singular values decay^0, decay^1, …"""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, min(m, n))))[0] for side in (m, n))
    return (u * decay ** np.arange(min(m, n))) @ v.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (8, 8)])
def test_all_columns_give_the_whole_decomposition(x64, shape):
    m = matrix(*shape, 0.8)
    rank = min(shape)
    u, s, v_t = map(np.asarray, randomized_svd(KEY, jnp.asarray(m), rank, iterations=0))
    np.testing.assert_allclose(s, np.linalg.svd(m, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose((u * s) @ v_t, m, atol=1e-12)
    for vectors in (u.T, v_t):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(rank), atol=1e-12)


def test_the_leading_triples_are_near_the_best_there_are(x64):
    m = matrix(60, 40, 0.7)
    u, s, v_t = map(np.asarray, randomized_svd(KEY, jnp.asarray(m), 5))
    np.testing.assert_allclose(s, np.linalg.svd(m, compute_uv=False)[:5], rtol=1e-7)
    best = np.linalg.norm(np.linalg.svd(m, compute_uv=False)[5:])
    assert np.linalg.norm(m - (u * s) @ v_t) < 1.0001 * best


def test_power_iterations_find_what_a_flat_spectrum_hides(x64):
    """Errors within the columns, whose mean Halko et al. bound by (1 + k / (p - 1))^½ of the best
    without a power iteration; with each they fall.
    """
    m = jnp.asarray(matrix(80, 60, 0.97))
    best = np.linalg.norm(np.linalg.svd(m, compute_uv=False)[6:])
    errors = []
    for iterations in (0, 1, 4):
        batch = jnp.broadcast_to(m, (8, 80, 60))
        found = randomized_svd(KEY, batch, 6, oversampling=4, iterations=iterations)
        u, s, v_t = map(np.asarray, found)
        off = np.linalg.norm(batch - (u * s[:, None]) @ v_t, axis=(1, 2))
        errors.append(off.mean() / best)
    assert 1 < errors[2] < errors[1] < errors[0] < 1.7


def test_a_batch_shares_nothing_but_its_shape():
    m = jnp.asarray([[matrix(12, 9, 0.5, seed) for seed in range(3)]], jnp.float32)
    u, s, v_t = randomized_svd(KEY, m, 3)
    assert u.shape == (1, 3, 12, 3) and s.shape == (1, 3, 3) and v_t.shape == (1, 3, 3, 9)
    np.testing.assert_allclose(s[0], np.tile([1, 0.5, 0.25], (3, 1)), rtol=1e-4)


def test_narrow_types_are_widened():
    u, s, _ = randomized_svd(KEY, jnp.asarray(matrix(8, 8, 0.5), jnp.bfloat16), 2)
    assert u.dtype == s.dtype == jnp.float32


def test_gradients_are_those_of_finite_differences(x64):
    rng = np.random.default_rng(1)
    m, direction = matrix(9, 7, 0.6), rng.normal(size=(9, 7))

    def loss(m):
        u, s, v_t = randomized_svd(KEY, m, 2, oversampling=2, iterations=1)
        return jnp.sum(s**2) + jnp.sum(((u * s) @ v_t) ** 3)

    both, step = jax.jit(jax.value_and_grad(loss)), 1e-6 * direction
    expected = (both(m + step)[0] - both(m - step)[0]) / 2e-6
    np.testing.assert_allclose(np.sum(both(m)[1] * direction), expected, rtol=1e-6)


def gram(n, decay):
    m = matrix(n, n, decay)
    return jnp.asarray(m @ m.T)


def test_eigenvectors_of_all_columns_are_the_whole_decomposition(x64):
    a = gram(12, 0.8)
    values, u = map(np.asarray, randomized_eigh(KEY, lambda v: a @ v, 12, 12, iterations=0,
                                                dtype=jnp.float64))  # fmt: skip
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a)[::-1], atol=1e-12)
    np.testing.assert_allclose((u * values) @ u.T, a, atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(12), atol=1e-12)


def test_leading_eigenvectors_are_near_the_best_and_come_nearer_with_each_product(x64):
    a = gram(80, 0.97)
    best, kept = np.linalg.eigvalsh(a)[-6:].sum(), []
    for iterations in (0, 1, 4, 16):
        values, u = randomized_eigh(KEY, lambda v: a @ v, 80, 6, oversampling=4,
                                    iterations=iterations, dtype=jnp.float64)  # fmt: skip
        np.testing.assert_allclose(np.trace(u.T @ a @ u), values.sum())
        kept.append(float(values.sum() / best))
    assert 0.2 < kept[0] < kept[1] < kept[2] < kept[3] < 1 + 1e-9 and kept[3] > 0.999


def test_a_matrix_of_zeros_has_directions_too():
    values, u = randomized_eigh(KEY, jnp.zeros_like, 20, 3)
    np.testing.assert_array_equal(values, 0)
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-6)


def test_principal_components_are_scikit_learns(x64):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 8)) * 0.6 ** np.arange(8) @ rng.normal(size=(8, 8)) + 3
    found, theirs = pca(KEY, jnp.asarray(x), 3), PCA(3, svd_solver="full").fit(x)
    np.testing.assert_allclose(found.mean, theirs.mean_, rtol=1e-12)
    np.testing.assert_allclose(found.variances, theirs.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(found.components, theirs.components_, atol=1e-8)
    ratio = np.asarray(found.variances) / found.total
    np.testing.assert_allclose(ratio, theirs.explained_variance_ratio_, rtol=1e-9)


def test_the_graph_does_not_grow():
    def size(n):
        return equations(
            jax.make_jaxpr(lambda m: randomized_svd(KEY, m, 3))(jnp.ones((n, n))).jaxpr
        )

    assert size(16) == size(64) < 100

    def of_products(iterations):
        found = jax.make_jaxpr(
            lambda a: randomized_eigh(KEY, lambda v: a @ v, 16, 3, iterations=iterations)
        )(jnp.eye(16))
        return equations(found.jaxpr)

    assert of_products(1) == of_products(9) < 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank=0 must be from 1 to min"),
        (dict(rank=5), r"rank=5 must be from 1 to min\(m, n\)=4"),
        (dict(rank=2, oversampling=-1), "oversampling=-1"),
        (dict(rank=2, iterations=-1), "iterations=-1 must not be negative"),
    ],
)
def test_refuses_what_means_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(KEY, jnp.ones((4, 6)), **options)
    with pytest.raises(ValueError, match=message):
        randomized_eigh(KEY, lambda v: v, 4, **options)


def test_one_point_does_not_vary():
    with pytest.raises(ValueError, match="at least two points"):
        pca(KEY, jnp.ones((1, 3)), 1)
