"""Lanczos' iteration against dense and SciPy's eigenvalues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

from algorithms.linalg import eigenpairs, lanczos, quadrature
from tests.algorithms.test_clustering import equations


def symmetric(values, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))
    return (q * values) @ q.T


@functools.partial(jax.jit, static_argnames="steps")
def run(a, start, steps):
    found = lanczos(lambda v: a @ v, start, steps)
    return found, eigenpairs(found), quadrature(found)


def started(a, steps, dtype=np.float64):
    """The iteration, eigenpairs and rule of one start, as NumPy arrays."""
    start = np.random.default_rng(1).normal(size=len(a))
    return jax.tree.map(np.asarray, run(a.astype(dtype), start.astype(dtype), steps))


def tridiagonal(found):
    beta = found.off_diagonal[:-1]
    return np.diag(found.diagonal) + np.diag(beta, 1) + np.diag(beta, -1)


def test_all_steps_give_every_eigenvalue(x64):
    values = np.sort(np.random.default_rng(0).normal(size=24))
    a = symmetric(values)
    found, pairs, _ = started(a, 24)
    np.testing.assert_allclose(pairs.values, values, atol=1e-11)
    np.testing.assert_allclose(a @ pairs.vectors.T, pairs.vectors.T * pairs.values, atol=1e-10)
    np.testing.assert_allclose(found.basis @ a @ found.basis.T, tridiagonal(found), atol=1e-11)


def test_outer_eigenvalues_are_scipys_and_residuals_tell_which_to_believe(x64):
    values = np.concatenate([np.linspace(-1, 1, 60), [3.0, 5.0, -4.0]])
    a = symmetric(values)
    _, pairs, _ = started(a, 24)
    theirs = np.sort(eigsh(a, 3, which="LM", return_eigenvectors=False))
    believed = pairs.values[pairs.residuals < 1e-6]
    np.testing.assert_allclose(believed, theirs, atol=1e-10)
    left = np.linalg.norm(a @ pairs.vectors.T - pairs.vectors.T * pairs.values, axis=0)
    np.testing.assert_allclose(pairs.residuals, left, atol=1e-10)


def test_the_basis_stays_orthogonal_long_after_eigenvalues_converged():
    """In float32, and of a spectrum where plain Lanczos finds its largest eigenvalue many times."""
    a = symmetric(np.concatenate([np.linspace(0, 1, 190), np.geomspace(10, 1e4, 10)]))
    found, pairs, _ = started(a, 80, np.float32)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(80), atol=1e-5)
    assert np.sum(pairs.values > 9e3) == 1


def test_the_rule_is_exact_for_polynomials_of_degree_2k_minus_1(x64):
    a = symmetric(np.linspace(-1, 2, 20))
    found, _, (nodes, weights) = started(a, 4)
    unit = found.basis[0]
    for degree in range(8):
        exact = unit @ np.linalg.matrix_power(a, degree) @ unit
        np.testing.assert_allclose(np.sum(weights * nodes**degree), exact, rtol=1e-9)
    exact = unit @ np.linalg.matrix_power(a, 8) @ unit
    assert abs(np.sum(weights * nodes**8) / exact - 1) > 1e-6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_space_that_is_used_up_ends_the_iteration(x64, dtype):
    """Three different eigenvalues: three steps, and zeros after them, not rounding's."""
    a = symmetric(np.repeat([1.0, 2.0, 5.0], 4))
    found, _, (nodes, weights) = started(a, 8, dtype)
    assert not found.off_diagonal[3:].any() and not found.diagonal[4:].any()
    seen = weights > 1e-6
    np.testing.assert_allclose(nodes[seen], [1, 2, 5], rtol=1e-5)
    np.testing.assert_allclose(weights[seen].sum(), 1, rtol=1e-5)


def test_pytrees_keep_their_structure_and_types():
    """A is diagonal: of its own numbers, whatever the leaves are."""
    scale = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.asarray([-3.0, 0.5])}
    start = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), scale)
    matvec = lambda v: jax.tree.map(jnp.multiply, scale, v)  # noqa: E731
    found = jax.jit(lambda start: lanczos(matvec, start, 8))(start)
    pairs = eigenpairs(found)
    assert found.basis["w"].shape == (8, 2, 3) and found.basis["w"].dtype == jnp.float32
    np.testing.assert_allclose(pairs.values, [-3, 0.5, 1, 2, 3, 4, 5, 6], atol=1e-4)
    np.testing.assert_allclose(np.abs(pairs.vectors["b"][0]), [1, 0], atol=1e-3)


def test_batches_by_vmap(x64):
    a = np.stack([symmetric(np.linspace(0, 1, 9), seed) for seed in range(3)])
    start = np.tile(np.random.default_rng(1).normal(size=9), (3, 1))
    together, _, _ = jax.vmap(lambda a, start: run(a, start, 5))(a, start)
    for n in range(3):
        alone, _, _ = started(a[n], 5)
        np.testing.assert_allclose(together.diagonal[n], alone.diagonal, atol=1e-12)


def test_the_graph_grows_neither_with_width_nor_with_steps():
    def size(n, steps):
        traced = jax.make_jaxpr(lambda a, v: run(a, v, steps))(np.ones((n, n)), np.ones(n))
        return equations(traced.jaxpr)

    assert size(8, 4) == size(64, 32) < 150


@pytest.mark.parametrize("steps", [0, 7])
def test_other_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be from 1 to 6"):
        lanczos(lambda v: v, jnp.ones((2, 3)), steps)
