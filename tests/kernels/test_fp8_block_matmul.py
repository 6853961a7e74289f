import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import aot
from kernels.fp8_block_matmul import fp8_block_matmul, mosaic, shapes
from kernels.fp8_block_matmul.shapes import workload
from kernels.workload import shapes as shapes_of
from tests.kernels.suite import KernelSuite

ANYWHERE = ("reference", "xla")


class TestFp8BlockMatmul(KernelSuite):
    everywhere = {
        **{f"{m}x{n}x{k}": workload(m, n, k)
           for m, n, k in [(1, 1, 1), (1, 3, 200), (5, 130, 128), (64, 1, 40), (100, 300, 257),
                           (3, 256, 512), (130, 128, 384)]},
        "float32": workload(9, 200, 300, "float32"),
    }  # fmt: skip
    small = {
        "a pair that shares x": workload(128, 256, 512),
        "more steps than the pipeline has": workload(64, 128, 1024),
        "K split, rows that end in a tile": workload(5, 256, 2048),
        "rows that end between tiles": workload(200, 128, 512),
    }
    real = shapes.WORKLOADS


def in_float64(x, w, x_scale, w_scale):
    x, w, x_scale, w_scale = (np.asarray(a, np.float64) for a in (x, w, x_scale, w_scale))
    (_, k), (n, _) = x.shape, w.shape
    x = x * np.repeat(x_scale, 128, 1)[:, :k]
    return x @ (w * np.repeat(np.repeat(w_scale, 128, 0)[:n], 128, 1)[:, :k]).T


def off(found, exact) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("m", [3, 100])  # both forms of XLA
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_it_is_the_product_of_what_the_codes_stand_for(implementation, m):
    case = workload(m, 256, 384, "float32")
    arguments = case.arguments(jax.random.key(0))
    found = case.run(*arguments, implementation=implementation)
    assert off(found, in_float64(*arguments)) < 4e-3


@pytest.mark.parametrize(
    ("m", "n", "sms", "way"),
    [
        (300, 128, 2, mosaic.Plan(128, (3, 1), None, 1)),
        (8, 512, 2, mosaic.Plan(64, (1, 4), "n", 1)),
        (256, 256, 2, mosaic.Plan(128, (2, 2), "m", 1)),
    ],
    ids=["alone", "sharing x", "sharing w"],
)
def test_blocks_that_stay_on_their_sm_leave_no_tile_out(m, n, sms, way):
    assert mosaic.plan(m, n, 512, sms) == way
    arguments = workload(m, n, 512, "float32").arguments(jax.random.key(0))

    @jax.jit
    def run(*arguments):
        return mosaic.fp8_block_matmul(*arguments, out_dtype="float32", interpret=True, sms=sms)

    found = run(*arguments)
    assert off(found, in_float64(*arguments)) < 1e-6


@pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
def test_every_scale_meets_its_own_block(implementation):
    """Powers of two and codes of 1: sums that are exact, and different for every pair of blocks."""
    m, n, k = 8, 128, 512
    x, w = (jnp.ones(shape, jnp.float8_e4m3fn) for shape in ((m, k), (n, k)))
    x_scale = 2.0 ** (jnp.arange(m)[:, None] % 3 + 3 * jnp.arange(4)[None])
    w_scale = 2.0 ** -jnp.arange(4.0)[None]
    found = fp8_block_matmul(
        x, w, x_scale, w_scale, out_dtype="float32", implementation=implementation
    )
    expected = 128 * (x_scale * w_scale).sum(1, keepdims=True)
    np.testing.assert_array_equal(found, jnp.broadcast_to(expected, (m, n)))


@pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
def test_what_is_not_a_number_shows_where_it_belongs(implementation):
    x, w, x_scale, w_scale = workload(8, 128, 512).arguments(jax.random.key(1))
    x = x.at[2, 7].set(jnp.nan)
    x_scale = x_scale.at[5, 1].set(jnp.inf)
    found = fp8_block_matmul(x, w, x_scale, w_scale, implementation=implementation)
    wrong = np.array([2, 5])
    assert not jnp.isfinite(found[wrong]).any()
    assert jnp.isfinite(np.delete(found, wrong, 0)).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"w": jnp.zeros((128, 384))}, r"w.shape=\(128, 384\) must be \(N, K\) with the K of x"),
        ({"x_scale": jnp.zeros((4, 3))}, r"x_scale.shape=\(4, 3\) must be .* = \(8, 4\)"),
        ({"w_scale": jnp.zeros((4, 1))}, r"w_scale.shape=\(4, 1\) must be .* = \(1, 4\)"),
        ({"out_dtype": "float16"}, "out_dtype='float16' is not one of bfloat16, float32"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(change, sentence):
    arguments = {
        "x": jnp.zeros((8, 512), jnp.float8_e4m3fn),
        "w": jnp.zeros((128, 512), jnp.float8_e4m3fn),
        "x_scale": jnp.zeros((8, 4)),
        "w_scale": jnp.zeros((1, 4)),
        **change,
    }
    arguments["w"] = arguments["w"].astype(jnp.float8_e4m3fn)
    with pytest.raises(ValueError, match=sentence):
        fp8_block_matmul(**arguments)


@pytest.mark.parametrize(
    ("n", "k", "reason"),
    [
        (128, 384, "takes K in multiples of 512, and K=384"),
        (64, 512, "takes N in multiples of 128"),
    ],
)
def test_the_kernel_says_what_it_lacks(n, k, reason):
    arguments = workload(8, n, k).arguments(jax.random.key(0))
    with pytest.raises(ValueError, match=reason):
        fp8_block_matmul(*arguments, implementation="interpret")


@pytest.mark.aot
def test_the_xla_form_keeps_w_in_float8_for_few_rows():
    case = shapes.WORKLOADS["8B qkv M=16, float32"]
    program = aot.compile(lambda *a: case.run(*a, implementation="xla"), *shapes_of(case))
    partial_sums = 32 * 16 * 6144 * 4
    assert program.temporary < 1.1 * partial_sums < 6144 * 4096  # bytes of w
