import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.hadamard import IMPLEMENTATIONS, factor, hadamard, hadamard_matrix, largest_block
from kernels.hadamard.matrices import CIRCULANTS

BASES = [76, 92, 100, 108, 116, 140, 148, 156, 172, 188, 364]
WIDTHS = {  # of layers of real models: the order of the matrix before doubling
    **{64: 1, 192: 12, 576: 36, 896: 28, 960: 60, 1536: 12, 2048: 1, 3072: 12, 3584: 28},
    **{4096: 1, 4864: 76, 5120: 20, 8192: 1, 8960: 140, 9728: 76, 11008: 172, 13824: 108},
    **{14336: 28, 17408: 68, 18944: 148, 25600: 100, 28672: 28, 29568: 924},
}


def butterflies(x):
    """x S over the last axis, S of Sylvester, in pairs of sums and differences as textbooks do."""
    n, half = x.shape[-1], 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], -2).reshape(x.shape)
        half *= 2
    return x


def by_hand(x, inverse=False):
    """x H / √n in float64, from the matrix before doubling."""
    n = x.shape[-1]
    m, power = factor(n)
    h = hadamard_matrix(m).astype(np.float64)
    split = x.reshape(*x.shape[:-1], m, power)
    y = np.einsum("...as,ab->...bs", split, h.T if inverse else h)
    return butterflies(y).reshape(x.shape) / math.sqrt(n)


class TestMatrices:
    @pytest.mark.parametrize("n", [1, 2, *range(4, 65, 4), *BASES])
    def test_they_are_signs_with_orthogonal_rows(self, n):
        h = hadamard_matrix(n)
        assert h.dtype == np.int8 and h.shape == (n, n)
        assert set(np.unique(h)) <= {-1, 1}
        np.testing.assert_array_equal(h.astype(int) @ h.T.astype(int), n * np.eye(n, dtype=int))

    def test_powers_of_two_are_sylvesters(self):
        two = np.array([[1, 1], [1, -1]])
        np.testing.assert_array_equal(hadamard_matrix(8), np.kron(np.kron(two, two), two))

    def test_doubling_is_a_kronecker_product_with_sylvesters(self):
        expected = np.kron(hadamard_matrix(12), hadamard_matrix(4))
        np.testing.assert_array_equal(hadamard_matrix(48), expected)

    @pytest.mark.parametrize("q", [17, 25, 37])
    def test_paley_two_is_symmetric(self, q):
        h = hadamard_matrix(2 * (q + 1))
        np.testing.assert_array_equal(h, h.T)

    @pytest.mark.parametrize("q", [11, 19, 27, 59])
    def test_paley_one_is_skew_about_its_diagonal(self, q):
        s = hadamard_matrix(q + 1) - np.eye(q + 1, dtype=int)
        np.testing.assert_array_equal(s, -s.T)

    @pytest.mark.parametrize("n", sorted(CIRCULANTS))
    def test_stored_circulants_have_autocorrelations_that_sum_to_zero(self, n):
        rows = np.array([[1 if sign == "+" else -1 for sign in row] for row in CIRCULANTS[n]])
        assert rows.shape == (4, n)
        sums = [np.sum(rows * np.roll(rows, shift, axis=1)) for shift in range(n)]
        assert sums == [4 * n] + [0] * (n - 1)

    def test_they_are_read_only_and_made_once(self):
        h = hadamard_matrix(12)
        assert hadamard_matrix(12) is h and not h.flags.writeable

    @pytest.mark.parametrize("n, m", WIDTHS.items())
    def test_widths_of_real_models_factor(self, n, m):
        assert factor(n) == (m, n // m) and largest_block(n) == n

    @pytest.mark.parametrize("n, block", [(1, 1), (7, 1), (6, 2), (130, 2), (324, 108)])
    def test_largest_block(self, n, block):
        assert largest_block(n) == block
        assert n % block == 0 and math.prod(factor(block)) == block

    def test_sizes_without_one_are_refused(self):
        for n, block in [(3, 1), (6, 2), (50, 2), (236, 4)]:
            with pytest.raises(ValueError, match=f"n={n} has no .* in blocks of {block}, the larg"):
                factor(n)
        for n in (0, -4):
            with pytest.raises(ValueError, match=f"n={n} must be positive"):
                factor(n)
            with pytest.raises(ValueError, match=f"n={n} must be positive"):
                largest_block(n)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
class TestHadamard:
    @pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 48, 64, 156, 172, 576])
    def test_it_and_its_inverse_agree_with_float64(self, implementation, n):
        x = np.random.default_rng(n).standard_normal((3, n))
        for inverse in (False, True):
            found = hadamard(
                jnp.asarray(x, jnp.float32), inverse=inverse, implementation=implementation
            )
            h = hadamard_matrix(n).astype(np.float64)
            expected = x @ (h.T if inverse else h) / math.sqrt(n)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)

    def test_the_inverse_undoes_it(self, implementation):
        x = jax.random.normal(jax.random.key(0), (2, 3, 24))
        there = hadamard(x, implementation=implementation)
        back = hadamard(there, inverse=True, implementation=implementation)
        np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(there - x).max()) > 0.5

    def test_its_gradient_is_its_inverse(self, implementation):
        """H/√n is orthogonal: the gradient of <y, x H/√n> is y Hᵀ/√n."""
        x, y = jax.random.normal(jax.random.key(1), (2, 5, 12))
        gradient = jax.grad(lambda x: jnp.sum(hadamard(x, implementation=implementation) * y))(x)
        np.testing.assert_allclose(gradient, by_hand(np.asarray(y), inverse=True), atol=1e-6)

    def test_jit_and_vmap_take_it(self, implementation):
        x = jax.random.normal(jax.random.key(2), (4, 3, 40))
        f = jax.jit(jax.vmap(lambda x: hadamard(x, implementation=implementation)))
        expected = by_hand(np.asarray(x, np.float64))
        np.testing.assert_allclose(f(x), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_sixteen_bits_are_computed_in_float32(self, implementation, dtype):
        """1024 times 100 overflows float16, and adding 1 to 256 is lost in bfloat16."""
        n = 1024
        x = jnp.full((1, n), 100, dtype).at[0, 1].set(1)
        found = hadamard(x, implementation=implementation)
        assert found.dtype == dtype
        exact = by_hand(np.asarray(x, np.float64))
        np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.float32).astype(dtype))

    def test_float64_stays_float64(self, implementation):
        with jax.enable_x64(True):
            x = np.random.default_rng(0).standard_normal((2, 60))
            found = hadamard(jnp.asarray(x), implementation=implementation)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, by_hand(x), rtol=1e-12, atol=1e-13)

    def test_no_rows_and_a_single_vector(self, implementation):
        assert hadamard(jnp.zeros((0, 12)), implementation=implementation).shape == (0, 12)
        x = jnp.arange(12.0)
        found = hadamard(x, implementation=implementation)
        np.testing.assert_allclose(found, by_hand(np.arange(12.0)), rtol=1e-5, atol=1e-6)

    def test_what_is_not_finite_shows(self, implementation):
        x = jnp.ones((2, 12)).at[1, 3].set(jnp.nan)
        found = hadamard(x, implementation=implementation)
        assert jnp.isfinite(found[0]).all() and jnp.isnan(found[1]).all()


@pytest.mark.parametrize("n", [2048, 8960, 11008, 18944])
def test_real_widths_agree_with_butterflies_in_float64(n):
    x = np.random.default_rng(n).standard_normal((2, n))
    for inverse in (False, True):
        found = hadamard(jnp.asarray(x, jnp.float32), inverse=inverse)
        np.testing.assert_allclose(found, by_hand(x, inverse), rtol=1e-4, atol=2e-5)


def test_the_graph_has_one_product_per_factor():
    """Not one per doubling, whatever the number of rows."""

    def products(rows, n):
        graph = jax.make_jaxpr(hadamard)(jax.ShapeDtypeStruct((rows, n), jnp.float32))
        return sum(e.primitive.name == "dot_general" for e in graph.jaxpr.eqns)

    assert products(5, 4096) == products(500, 4096) == 3
    assert products(5, 8960) == 3 and products(5, 172) == 1


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="implementation='cuda' is not one of auto"):
        hadamard(jnp.ones((2, 4)), implementation="cuda")
    with pytest.raises(ValueError, match="x.dtype=int32 must be a floating type"):
        hadamard(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match="n=6 has no Hadamard matrix here"):
        hadamard(jnp.ones((2, 6)))
