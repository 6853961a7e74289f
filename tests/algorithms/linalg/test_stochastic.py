"""Densities against a port of the official code; traces and diagonals against the dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.linalg import density, diagonal, lanczos, quadrature, spectrum, trace
from algorithms.linalg.stochastic import Spectrum
from tests.algorithms.linalg import spectral_density_official as official
from tests.algorithms.linalg.test_krylov import symmetric
from tests.algorithms.test_clustering import equations

KEY = jax.random.key(0)


def test_the_density_is_the_official_codes(x64):
    a = symmetric(np.concatenate([np.linspace(-0.2, 0.2, 45), np.linspace(1, 4, 5)]))
    starts = np.random.default_rng(1).normal(size=(3, 50))
    tridiagonals = [official.lanczos(a, start, 12) for start in starts]
    expected, grid, variance = official.density(tridiagonals, 1e-3, 200)
    rule = jax.vmap(lambda start: quadrature(lanczos(lambda v: a @ v, start, 12)))
    found = Spectrum(*jax.jit(rule)(starts))
    ours = np.asarray(density(found, jnp.asarray(grid), variance**0.5))
    np.testing.assert_allclose(ours / (ours.sum() * (grid[1] - grid[0])), expected, atol=1e-8)


def test_it_counts_eigenvalues_where_they_are(x64):
    """80 % of them near 0, 20 % near 3."""
    values = np.concatenate([np.linspace(-0.1, 0.1, 160), np.linspace(2.9, 3.1, 40)])
    a = symmetric(values)
    grid = np.linspace(-1, 4, 500)

    @jax.jit
    def shown(key):
        found = spectrum(key, lambda v: a @ v, jnp.zeros(200), probes=16, steps=20)
        return density(found, jnp.asarray(grid), 0.05)

    found = np.asarray(shown(KEY)) * (grid[1] - grid[0])
    mass = found[grid > 1.5].sum()
    np.testing.assert_allclose(found.sum(), 1, atol=1e-3)
    np.testing.assert_allclose(mass, 0.2, atol=0.03)


def test_traces_and_diagonals_are_within_their_errors(x64):
    a = symmetric(np.random.default_rng(3).normal(size=30) + 1)

    @jax.jit
    def both(key):
        like = jnp.zeros(30)
        return (trace(key, lambda v: a @ v, like, probes=64),
                diagonal(key, lambda v: a @ v, like, probes=64))  # fmt: skip

    found, each = both(KEY)
    assert 0 < found.standard_error < 2
    assert abs(found.mean - np.trace(a)) < 4 * found.standard_error
    off = np.abs(each.mean - np.diag(a)) / each.standard_error
    assert off.max() < 5 and 0.5 < np.sqrt(np.mean(off**2)) < 1.5


def test_errors_are_those_of_independent_probes(x64):
    """Means and standard errors as NumPy has them of the same products, also those of a tree."""
    a = symmetric(np.linspace(-1, 3, 6))
    split = lambda v: {"x": v[:2], "y": v[2:].reshape(2, 2)}  # noqa: E731
    flat = lambda tree: jnp.concatenate([tree["x"], tree["y"].reshape(-1)])  # noqa: E731
    seen = []

    def matvec(tree):
        z = flat(tree)
        jax.debug.callback(lambda z: seen.append(np.array(z)), z, ordered=True)
        return split(a @ z)

    found = jax.jit(lambda key: diagonal(key, matvec, split(jnp.zeros(6)), probes=5))(KEY)
    jax.effects_barrier()
    products = np.stack([z * (a @ z) for z in seen])
    assert set(np.abs(seen).ravel()) == {1.0} and len(seen) == 5
    np.testing.assert_allclose(flat(found.mean), products.mean(0), atol=1e-12)
    expected = products.std(0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(flat(found.standard_error), expected, atol=1e-12)


def test_of_a_diagonal_matrix_one_probe_says_all():
    values = jnp.asarray([1.0, -2.0, 5.0])

    @jax.jit
    def both(key):
        arguments = key, lambda v: values * v, values
        return diagonal(*arguments, probes=2), trace(*arguments, probes=2)

    found, total = both(KEY)
    np.testing.assert_allclose(found.mean, values)
    np.testing.assert_array_equal(found.standard_error, 0)
    np.testing.assert_allclose(total.mean, 4)


def test_the_graph_grows_with_nothing():
    def size(n, probes, steps):
        def run(a):
            found = spectrum(KEY, lambda v: a @ v, a[0], probes=probes, steps=steps)
            return density(found, a[0], 0.1), diagonal(KEY, lambda v: a @ v, a[0], probes=probes)

        return equations(jax.make_jaxpr(run)(jnp.ones((n, n))).jaxpr)

    assert size(8, 2, 4) == size(64, 5, 16) < 300


def test_too_few_probes_are_refused():
    with pytest.raises(ValueError, match="probes=0 must be at least 1"):
        spectrum(KEY, lambda v: v, jnp.ones(3), probes=0, steps=2)
    with pytest.raises(ValueError, match="probes=1 must be at least 2"):
        trace(KEY, lambda v: v, jnp.ones(3), probes=1)
