import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import hessian


def spd(n, seed=0):
    x = np.random.default_rng(seed).standard_normal((2 * n, n))
    return x.T @ x


@pytest.mark.parametrize("n", [1, 2, 7, 255, 256, 257, 600])
def test_the_inverse_factor_is_upper_and_gives_the_damped_inverse(n):
    with jax.enable_x64(True):
        h = spd(n)
        u = np.asarray(hessian.inverse_factor(jnp.asarray(h), 0.01))
        damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(n)
        np.testing.assert_array_equal(u, np.triu(u))
        assert (np.diag(u) > 0).all()
        np.testing.assert_allclose(u.T @ u @ damped, np.eye(n), atol=1e-8)
        expected = np.linalg.cholesky(np.linalg.inv(damped)).T  # the official code's way
        np.testing.assert_allclose(u, expected, atol=1e-9)


def test_what_is_not_positive_definite_gives_nan():
    assert jnp.isnan(hessian.inverse_factor(jnp.diag(jnp.asarray([1.0, -1.0])), 0.0)).any()


def test_statistics_add_up_and_give_the_output_error():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 8)).astype(np.float32)
    stats = hessian.init(8)
    for piece in np.split(x, 3):
        stats = hessian.observe(stats, jnp.asarray(piece))
    np.testing.assert_allclose(stats.gram, x.T @ x, rtol=1e-5, atol=1e-5)
    w, v = rng.standard_normal((2, 5, 8)).astype(np.float32)
    expected = np.sum((x @ (w - v).T) ** 2) / np.sum((x @ w.T) ** 2)
    found = hessian.output_error(jnp.asarray(w), jnp.asarray(v), stats)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
