import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.packing import pack
from kernels.wna16_matmul import IMPLEMENTATIONS, wna16_matmul


def problem(m, i, o, groups, bits, symmetric, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*m, i))
    codes = rng.integers(0, 2**bits, (o, i), np.uint8)
    scale = rng.uniform(0.01, 1, (o, groups)).astype(np.float32)
    zero = None if symmetric else rng.integers(0, 2**bits, (o, groups), np.uint8)
    offset = np.full((o, groups), 2 ** (bits - 1)) if symmetric else zero
    w = (codes.astype(float) - np.repeat(offset, i // groups, 1)) * np.repeat(scale, i // groups, 1)
    packed = pack(jnp.asarray(codes), bits)
    return x, packed, jnp.asarray(scale), zero if zero is None else jnp.asarray(zero), x @ w.T


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
class TestWna16Matmul:
    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize(
        "m, i, o, groups", [((), 6, 3, 1), ((5,), 24, 7, 3), ((2, 3), 35, 1, 5)]
    )
    def test_it_agrees_with_float64(self, implementation, bits, symmetric, m, i, o, groups):
        x, packed, scale, zero, expected = problem(m, i, o, groups, bits, symmetric)
        x = jnp.asarray(x, jnp.float32)
        y = wna16_matmul(x, packed, scale, zero, bits=bits, implementation=implementation)
        assert y.shape == expected.shape and y.dtype == x.dtype
        bound = 1e-6 * np.abs(expected).max() * i
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=bound)

    def test_bfloat16_stays_within_its_rounding(self, implementation):
        x, packed, scale, zero, expected = problem((64,), 128, 32, 2, 4, False)
        x = jnp.asarray(x, jnp.bfloat16)
        y = wna16_matmul(x, packed, scale, zero, bits=4, implementation=implementation)
        assert y.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(y, float) - expected) / np.linalg.norm(expected)
        assert error < 1e-2

    def test_jit_agrees_with_eager(self, implementation):
        x, packed, scale, zero, _ = problem((4,), 32, 8, 2, 3, False)
        x = jnp.asarray(x, jnp.float32)

        def f(x, packed, scale, zero):
            return wna16_matmul(x, packed, scale, zero, bits=3, implementation=implementation)

        np.testing.assert_allclose(
            jax.jit(f)(x, packed, scale, zero), f(x, packed, scale, zero), rtol=1e-5, atol=1e-5
        )


def test_shapes_that_do_not_fit_are_refused():
    x, packed, scale, zero, _ = problem((2,), 24, 3, 3, 4, False)
    x = jnp.asarray(x, jnp.float32)
    with pytest.raises(ValueError, match="bits=9 must be from 2 to 8"):
        wna16_matmul(x, packed, scale, zero, bits=9)
    with pytest.raises(ValueError, match="needs 9 bytes"):
        wna16_matmul(x, packed, scale, zero, bits=3)
    with pytest.raises(ValueError, match="5 groups must divide the input dimension of x"):
        wna16_matmul(x, packed, jnp.ones((3, 5)), None, bits=4)
    with pytest.raises(ValueError, match="implementation='triton' is not one of"):
        wna16_matmul(x, packed, scale, zero, bits=4, implementation="triton")
