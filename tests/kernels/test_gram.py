import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import aot
from kernels.gram import gram
from kernels.gram.mosaic import _bands, _tile
from kernels.gram.shapes import WORKLOADS
from kernels.workload import Cost, Workload
from tests.kernels.suite import DifferentiableKernelSuite

IMPLEMENTATIONS = ("reference", "xla")  # that run anywhere


def workload(n, i, dtype="float32", tolerance=1e-6):
    def arguments(key):
        return (jax.random.normal(key, (n, i), dtype),)

    return Workload(arguments, gram, Cost(0, 0), tolerance=tolerance)


class TestGram(DifferentiableKernelSuite):
    everywhere = {
        **{f"{n}x{i}": workload(n, i)
           for n, i in [(1, 1), (1, 3), (7, 1), (5, 2), (64, 37), (33, 128)]},
        "bfloat16": workload(100, 24, "bfloat16", 4e-3),
    }  # fmt: skip
    small = {
        "one tile": workload(64, 128, "bfloat16", 4e-3),
        "parts of two": workload(72, 192, "bfloat16", 4e-3),
        "on and above the diagonal": workload(136, 256, "bfloat16", 4e-3),
        "a cut-off band, float16": workload(40, 320, "float16", 4e-3),
    }
    real = WORKLOADS
    by = (0,)

    def test_it_is_exactly_symmetric(self):
        x = jax.random.normal(jax.random.key(0), (50, 31))
        found = gram(x, implementation="xla")
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

    def test_the_kernel_mirrors_its_tiles_and_accumulates_in_float32(self):
        x = jax.random.normal(jax.random.key(0), (72, 192), jnp.bfloat16)
        found = gram(x, implementation="interpret")
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found[:128, 128:], found[128:, :128].T)
        # A tile on the diagonal is one product: a GPU sums both of its sides in one order, and
        # the interpreter's CPU need not.
        np.testing.assert_allclose(found, found.T, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("pairs", range(1, 8))
    def test_the_kernel_takes_every_tile_of_the_triangle_once(self, pairs):
        indices = jnp.arange(pairs * (4 * pairs + 2), dtype=jnp.int32)
        a, b = jax.jit(jax.vmap(lambda index: _tile(index, pairs)))(indices)
        expected = [(a, b) for a in range(2 * pairs) for b in range(2 * a, 4 * pairs)]
        assert sorted(zip(a.tolist(), b.tolist(), strict=True)) == expected

    @pytest.mark.parametrize("i, pairs", [(8, 1), (512, 1), (520, 2), (14336, 28)])
    def test_bands_cover_the_matrix(self, i, pairs):
        assert _bands(i) == pairs

    @pytest.mark.aot
    def test_its_gradient_holds_no_second_matrix_beside_the_symmetric_one(self):
        def gradient(x, g):
            return jax.vjp(lambda x: gram(x, implementation="mosaic"), x)[1](g)[0]

        x = jax.ShapeDtypeStruct((4096, 1024), "bfloat16")
        g = jax.ShapeDtypeStruct((1024, 1024), "float32")
        assert aot.compile(gradient, x, g).temporary <= 2 * 1024**2 + 4096 * 1024 * 4


@pytest.mark.parametrize(
    "x, reason",
    [
        (jnp.ones((16, 16)), r"takes x in bfloat16 or float16, and x.dtype=float32"),
        (
            jnp.ones((8, 96), jnp.bfloat16),
            r"takes n in .* i in multiples of 64, and x.shape=\(8, 96\)",
        ),
        (jnp.ones((12, 64), jnp.bfloat16), r"takes n in multiples of 8 and .* x.shape=\(12, 64\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(x, reason):
    with pytest.raises(ValueError, match=f"implementation='interpret' of gram {reason}"):
        gram(x, implementation="interpret")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='cuda' is not one of auto"):
        gram(jnp.ones((2, 2)), implementation="cuda")
