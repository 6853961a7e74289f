import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.gram import IMPLEMENTATIONS, gram
from kernels.workload import Cost, Workload
from tests.kernels.suite import Suite


def workload(n, i, dtype="float32", tolerance=1e-6):
    def arguments(key):
        return (jax.random.normal(key, (n, i), dtype),)

    return Workload(arguments, gram, Cost(0, 0), tolerance=tolerance)


class TestGram(Suite):
    everywhere = {
        **{f"{n}x{i}": workload(n, i)
           for n, i in [(1, 1), (1, 3), (7, 1), (5, 2), (64, 37), (33, 128)]},
        "bfloat16": workload(100, 24, "bfloat16"),
    }  # fmt: skip

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_it_is_exactly_symmetric(self, implementation):
        x = jax.random.normal(jax.random.key(0), (50, 31))
        found = gram(x, implementation=implementation)
        np.testing.assert_array_equal(found, found.T)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_low_precision_accumulates_in_float32(self, implementation):
        x = jnp.ones((1000, 2), jnp.bfloat16)
        found = gram(x, implementation=implementation)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, jnp.full((2, 2), 1000.0))

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_float64_stays_float64(self, implementation):
        with jax.enable_x64(True):
            x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 5)))
            found = gram(x, implementation=implementation)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, x.T @ x, rtol=1e-14)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_what_is_not_finite_shows(self, implementation):
        x = jnp.ones((4, 6)).at[1, 2].set(jnp.nan)
        found = gram(x, implementation=implementation)
        assert jnp.isnan(found[2]).all() and jnp.isnan(found[:, 2]).all()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='cuda' is not one of auto"):
        gram(jnp.ones((2, 2)), implementation="cuda")
