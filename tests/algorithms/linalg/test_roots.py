"""Inverse roots against SciPy's, and their gradients against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import fractional_matrix_power

from algorithms.linalg import inverse_root, newton_inverse_root
from tests.algorithms.linalg.test_krylov import symmetric
from tests.algorithms.test_clustering import equations

ROOTS = {"eigenvalues": inverse_root, "newton": newton_inverse_root}


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.some("eigenvalues-2", "eigenvalues-3", "newton-1", "newton-2", "newton-4")
def test_is_scipys(x64, root, p):
    a = symmetric(np.geomspace(1e-4, 50, 12))
    expected = fractional_matrix_power(a, -1 / p)
    np.testing.assert_allclose(
        root(jnp.asarray(a), p), expected, rtol=1e-7, atol=1e-8 * np.abs(expected).max()
    )


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_damping_is_of_the_mean_of_the_diagonal(x64, root):
    a = symmetric(np.linspace(0, 5, 6))
    damped = a + 0.1 * np.mean(np.diag(a)) * np.eye(6)
    found = root(jnp.asarray(a), 2, damping=0.1)
    np.testing.assert_allclose(found @ damped @ found, np.eye(6), atol=1e-10)


def test_newtons_steps_are_as_many_as_the_condition_asks(x64):
    a = jnp.asarray(symmetric(np.geomspace(1e-8, 1, 10)))
    assert np.isnan(newton_inverse_root(a, 2, steps=16)).all()
    found = newton_inverse_root(a, 2)
    np.testing.assert_allclose(found @ a @ found, np.eye(10), atol=1e-5)
    np.testing.assert_allclose(newton_inverse_root(a, 2, steps=100), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_each_matrix_of_a_batch_by_itself_also_where_one_has_no_root(root):
    bad = symmetric(np.asarray([-1.0, 1.0, 2.0]))
    good = symmetric(np.asarray([1.0, 4.0, 16.0]))
    batch = np.stack([good, bad, 100 * good])[None]
    found = np.asarray(root(jnp.asarray(batch, jnp.float32), 2))[0]
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[2], found[0] / 10, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.eigvalsh(found[0]), [0.25, 0.5, 1], rtol=1e-4)


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.some("eigenvalues-2", "newton-4")
def test_gradients_hold_where_eigenvalues_are_equal(x64, root, p):
    rng = np.random.default_rng(0)
    a, weights = symmetric(np.asarray([1.0, 2.0, 2.0, 2.0, 3.0])), rng.normal(size=(5, 5))
    direction = rng.normal(size=(5, 5))
    direction = direction + direction.T

    @jax.jit
    def loss(a):
        return jax.value_and_grad(lambda a: jnp.sum(weights * root(a, p, damping=0.1)))(a)

    step = 1e-6 * direction
    expected = (loss(a + step)[0] - loss(a - step)[0]) / 2e-6
    np.testing.assert_allclose(np.sum(loss(a)[1] * direction), expected, rtol=1e-6)


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_the_graph_does_not_grow(root):
    def size(n):
        return equations(jax.make_jaxpr(lambda a: root(a, 4, damping=0.1))(jnp.eye(n)).jaxpr)

    assert size(8) == size(64) < 80


def test_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="p=0 must be at least 1"):
        inverse_root(jnp.eye(2), 0)
    with pytest.raises(ValueError, match="damping=-1.0 not negative"):
        newton_inverse_root(jnp.eye(2), 2, damping=-1.0)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        newton_inverse_root(jnp.eye(2), 2, steps=0)
