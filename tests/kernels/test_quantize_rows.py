import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import aot
from kernels.hadamard import hadamard_matrix
from kernels.quantize_rows import LARGEST, quantize_rows, shapes, tiles
from kernels.quantize_rows.rotation import signs
from kernels.workload import shapes as shapes_of
from tests.kernels.suite import KernelSuite

ANYWHERE = ("reference", "xla")
SMALLEST = 2.0**-126


def workload(m, k, dtype="int8", *, of="bfloat16", **steps):
    """Of any type, and of tolerances for sums that the reference in float64 does not round."""
    found = shapes.workload(m, k, dtype, **steps)
    loose = 3 if steps.get("summed") and of != "float32" else 1

    def arguments(key):
        return tuple(None if a is None else a.astype(of) for a in found.arguments(key))

    return found._replace(arguments=arguments, tolerance=loose * found.tolerance)


everywhere = {
    **{f"{m}x{k} {dtype}": workload(m, k, dtype)
       for m, k, dtype in [(1, 1, "int8"), (7, 1, "fp8"), (1, 3, "int4"), (5, 130, "int8"),
                           (33, 64, "fp8")]},
    **{f"hadamard {n}, {dtype}": workload(3, 2 * n, dtype, hadamard=n)
       for n, dtype in [(64, "int8"), (128, "fp8"), (256, "int4")]},
    **{f"{of}, every step": workload(9, 384, of=of, summed=True, normed=True, hadamard=128)
       for of in ("float32", "bfloat16", "float16")},
    "sum": workload(9, 40, summed=True),
    "norm, fp8": workload(9, 40, "fp8", normed=True),
}  # fmt: skip


class TestQuantizeRows(KernelSuite):
    everywhere = everywhere
    small = {
        "one row": workload(1, 512),
        "a length of 4 · 128 · 7": workload(2, 3584, "int4", summed=True),
        "sum, norm": workload(3, 1024, "fp8", summed=True, normed=True),
        "norm": workload(2, 512, normed=True),
        "hadamard 64, rows that do not fill a tile": workload(5, 1024, hadamard=64),
        "hadamard 128, sum, blocks that do not": workload(
            4, 1792, "fp8", hadamard=128, summed=True
        ),
        "hadamard 128, blocks beyond 64": workload(1, 9216, hadamard=128),
        "hadamard 256, norm": workload(2, 2048, "int4", hadamard=256, normed=True),
    }
    real = shapes.WORKLOADS


STEPS = {
    "codes": {},
    "sum, norm": {"summed": True, "normed": True},
    "rotated": {"hadamard": 128},
    "every step": {"summed": True, "normed": True, "hadamard": 64},
}
EVERY = [(i, dtype, steps) for i in ANYWHERE for dtype in LARGEST for steps in STEPS]
INTERPRETED = [("int4", "codes"), ("int8", "sum, norm"), ("fp8", "rotated"), ("int8", "every step")]


@pytest.mark.parametrize(
    ("implementation", "dtype", "steps"), [*EVERY, *(("interpret", *case) for case in INTERPRETED)]
)
@pytest.mark.some(10)
def test_codes_are_those_of_float64_but_for_ties(implementation, dtype, steps):
    steps = STEPS[steps]
    case = workload(6, 512, dtype, **steps)
    arguments = case.arguments(jax.random.key(3))
    found = jax.jit(lambda *a: case.run(*a, implementation=implementation))(*arguments)
    y = in_float64(*arguments, steps.get("hadamard", 0))
    scale = np.abs(y).max(-1, keepdims=True) / LARGEST[dtype]
    np.testing.assert_allclose(np.asarray(found.scale), scale, rtol=3e-6)
    near = 3e-6 * LARGEST[dtype]
    codes = np.asarray(found.codes, np.float64)
    below, above = (on_the_grid(y / scale + by, dtype) for by in (-near, near))
    assert ((below <= codes) & (codes <= above)).all()


def in_float64(x, residual, weight, hadamard):
    total = x if residual is None else x + residual
    y = np.asarray(total, np.float64)
    if weight is not None:
        y /= np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
        y *= np.asarray(weight, np.float64)
    if hadamard:
        h = np.asarray(hadamard_matrix(hadamard), np.float64) / hadamard**0.5
        y = (y.reshape(-1, hadamard) @ h).reshape(y.shape)
    return y


def on_the_grid(y, dtype):
    if dtype == "fp8":
        return y.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.rint(y)


@pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
def test_ties_go_to_the_even_code(implementation):
    row = [127, 0.5, 1.5, 2.5, -0.5, -1.5, 63.5, -126.5, 0]
    x = jnp.zeros((1, 512), jnp.bfloat16).at[0, : len(row)].set(jnp.asarray(row, jnp.bfloat16))
    found = quantize_rows(x, implementation=implementation)
    assert found.scale.item() == 1
    assert found.codes[0, : len(row)].tolist() == [127, 0, 2, 2, 0, -2, 64, -126, 0]


@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [*((i, dtype) for i in ANYWHERE for dtype in LARGEST), ("interpret", "int8")],
)
@pytest.mark.some(5)
def test_what_is_not_a_number_shows_in_its_row_alone(implementation, dtype, hadamard):
    x = jax.random.normal(jax.random.key(0), (4, 1024), jnp.bfloat16)
    odd = x.at[0, 5].set(jnp.nan).at[2, 1].set(jnp.inf)
    found = quantize_rows(odd, dtype=dtype, hadamard=hadamard, implementation=implementation)
    clean = quantize_rows(x, dtype=dtype, hadamard=hadamard, implementation="xla")
    assert jnp.isnan(found.scale[0, 0])
    # A rotated infinity meets itself with both signs.
    assert not jnp.isfinite(found.scale[2, 0])
    assert (found.codes[jnp.array([0, 2])].astype(jnp.float32) == 0).all()
    for row in (1, 3):
        np.testing.assert_allclose(found.scale[row], clean.scale[row], rtol=1e-6)
        np.testing.assert_array_equal(found.codes[row], clean.codes[row])


@pytest.mark.parametrize("implementation", [*ANYWHERE, "interpret"])
@pytest.mark.parametrize("hadamard", [0, 64])
def test_rows_of_zeros_have_a_scale_and_tiny_rows_stay_below_a_step(implementation, hadamard):
    x = jnp.zeros((3, 1024), jnp.bfloat16)
    x = x.at[1].set(jax.random.normal(jax.random.key(0), (1024,)).astype(x.dtype) * 1e-36)
    found = quantize_rows(x, hadamard=hadamard, implementation=implementation)
    assert (found.scale[::2] == SMALLEST).all() and (found.codes[::2] == 0).all()
    y = in_float64(x, None, None, hadamard)[1]
    scale = float(found.scale[1, 0])
    assert scale >= SMALLEST
    # What is rotated may meet numbers below float32's normal ones, which are zero on the way.
    steps = 4 if hadamard else 0.51
    assert np.abs(np.asarray(found.codes[1], np.float64) * scale - y).max() <= steps * scale


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_a_rotation_keeps_what_rows_measure(implementation):
    x = jax.random.normal(jax.random.key(0), (8, 512)).at[:, 3].set(100.0)  # a column far off
    run = {"implementation": implementation}
    plain, rotated = quantize_rows(x, **run), quantize_rows(x, hadamard=128, **run)
    codes = rotated.codes.astype(jnp.float32) * rotated.scale
    np.testing.assert_allclose(
        jnp.linalg.norm(codes, axis=1), jnp.linalg.norm(x, axis=1), rtol=0.01
    )
    assert (rotated.scale < plain.scale / 2).all()  # what the rotation is for


@pytest.mark.parametrize("n", [64, 128, 256])
def test_the_matrix_is_the_one_of_kernels_hadamard(n):
    np.testing.assert_array_equal(signs(n, jnp.int8), hadamard_matrix(n))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": "int3"}, "dtype='int3' is not one of int8, fp8, int4"),
        ({"rms_weight": jnp.zeros(2)}, r"rms_weight.shape=\(2,\) must be \(K,\)"),
        ({"hadamard": 32}, r"hadamard=32 must be 0 \(no rotation\), 64, 128 or 256"),
        ({"hadamard": 256}, r"hadamard=256 must divide the columns of x, x.shape=\(2, 384\)"),
        ({"residual": jnp.zeros((2, 384), jnp.float16)}, "residual must be bfloat16"),
        ({"implementation": "interpret"}, "takes K in multiples of 512, and K=384"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_rows(jnp.zeros((2, 384), jnp.bfloat16), **change)


@pytest.mark.parametrize(
    ("k", "hadamard", "dtype", "reason"),
    [
        (512, 0, jnp.float32, "takes x in bfloat16, and x.dtype=float32"),
        (18944, 128, jnp.bfloat16, "has no tile of whole rows of K=18944 in blocks of 128"),
        (1536, 128, jnp.bfloat16, "takes M · K / 128 in multiples of 8, and M=1, K=1536"),
        (32768, 0, jnp.bfloat16, "takes shorter rows, and K=32768"),
    ],
)
def test_the_kernel_says_what_it_lacks(k, hadamard, dtype, reason):
    assert tiles.lacks(jnp.zeros((1, k), dtype), None, None, hadamard) == reason


# The combinations whose registers differ.
TIGHT = ["8B hidden M=8192, sum, norm, int8", "8B down M=8192, int8", "Qwen 7B down M=8192, fp8",
         "8B down M=8192, hadamard 128, int8", "8B hidden M=8192, hadamard 64, int4",
         "8B hidden M=8192, sum, norm, hadamard 128, int8"]  # fmt: skip


@pytest.mark.aot
@pytest.mark.parametrize("name", TIGHT)
def test_every_warpgroup_of_the_grid_fits_on_its_sm(name):
    case = shapes.WORKLOADS[name]
    x, residual, weight = arguments = shapes_of(case)
    way = tiles.plan(
        x.shape[1],
        case.run.keywords["hadamard"],
        residual=residual is not None,
        normed=weight is not None,
    )
    program = aot.compile(lambda *a: case.run(*a, implementation="mosaic"), *arguments)
    (kernel,) = program.kernels
    assert -(-kernel.registers // 8) * 8 * 128 * way.per_sm <= 65536


@pytest.mark.aot
def test_the_xla_form_rotates_by_one_product_of_bfloat16():
    case = shapes.WORKLOADS["8B hidden M=8192, hadamard 128, int8"]
    program = aot.compile(lambda *a: case.run(*a, implementation="xla"), *shapes_of(case))
    products = [line for line in program.text.splitlines() if " dot(" in line or "__cublas" in line]
    assert len(products) == 1, products
