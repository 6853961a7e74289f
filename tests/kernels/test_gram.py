import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gram import IMPLEMENTATIONS, gram


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
class TestGram:
    @pytest.mark.parametrize("n, i", [(1, 1), (1, 3), (7, 1), (5, 2), (64, 37), (33, 128)])
    def test_it_agrees_with_float64(self, implementation, n, i):
        x = np.random.default_rng(n * i).standard_normal((n, i))
        found = gram(jnp.asarray(x, jnp.float32), implementation=implementation)
        np.testing.assert_allclose(found, x.T @ x, rtol=1e-5, atol=1e-5)

    def test_it_is_exactly_symmetric(self, implementation):
        x = jax.random.normal(jax.random.key(0), (50, 31))
        found = gram(x, implementation=implementation)
        np.testing.assert_array_equal(found, found.T)

    def test_low_precision_accumulates_in_float32(self, implementation):
        x = jnp.ones((1000, 2), jnp.bfloat16)
        found = gram(x, implementation=implementation)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, jnp.full((2, 2), 1000.0))

    def test_float64_stays_float64(self, implementation):
        with jax.enable_x64(True):
            x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 5)))
            found = gram(x, implementation=implementation)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, x.T @ x, rtol=1e-14)

    def test_what_is_not_finite_shows(self, implementation):
        x = jnp.ones((4, 6)).at[1, 2].set(jnp.nan)
        found = gram(x, implementation=implementation)
        assert jnp.isnan(found[2]).all() and jnp.isnan(found[:, 2]).all()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='cuda' is not one of auto"):
        gram(jnp.ones((2, 2)), implementation="cuda")
