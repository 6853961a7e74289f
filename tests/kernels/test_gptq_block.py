import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms.elements import Integer
from algorithms.formats import Format, fp8
from kernels import aot
from kernels.gptq_block import UNROUNDED, Functions, Integers, gptq_block, mosaic
from kernels.gptq_block.mosaic import rows_of_a_thread
from kernels.gptq_block.shapes import WORKLOADS, workload
from kernels.workload import shapes
from tests.kernels.suite import KernelSuite

REAL_ZEROS = Integers(bits=3, whole_zero=False)
E4M3 = Functions(fp8().encode, fp8().decode)


class TestGPTQBlock(KernelSuite):
    everywhere = {
        "one": workload((), 1, 1),
        "one column": workload((), 1, 9),
        "one row": workload((), 13, 1),
        "groups out of order": workload((), 24, 7, groups=3),
        "a batch, 8 bits": workload((2,), 6, 5, grid=Integers(bits=8)),
        "batches of batches, 2 bits": workload((2, 3), 4, 5, grid=Integers(bits=2)),
        "real zero points": workload((), 12, 11, groups=2, grid=REAL_ZEROS),
        "another element": workload((), 12, 11, grid=E4M3),
        "half of them go": workload((), 12, 11, groups=2, kept=0.5),
        "a batch of which some go, unrounded": workload((2,), 6, 5, grid=UNROUNDED, kept=0.7),
    }  # fmt: skip
    small = {
        "eight columns": workload((), 8, 128),
        "groups out of order, real zero points": workload((), 24, 128, groups=4, grid=REAL_ZEROS),
        "a batch": workload((2,), 16, 128, grid=Integers(bits=8)),
    }
    real = WORKLOADS

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    @pytest.mark.parametrize("grid", [Integers(bits=4), REAL_ZEROS])
    def test_every_code_is_the_nearest_to_what_earlier_errors_left(self, implementation, grid):
        """Told from the errors themselves: where a tie decides, either code passes."""
        w, u, scale, zero, group = workload((), 16, 256, groups=2, grid=grid).arguments(
            jax.random.key(3)
        )
        codes, error = gptq_block(
            w, u, scale, zero, group, grid=grid, implementation=implementation
        )
        w, u, error, s, z = (
            np.asarray(x, np.float64) for x in (w, u, error, scale[group], zero[group])
        )
        left = w - np.triu(u, 1).T @ error
        decoded = (np.asarray(codes, np.float64) - z) * s
        np.testing.assert_allclose(error, (left - decoded) / np.diag(u)[:, None], atol=1e-5)
        nearest = np.clip(left / s + z, 0, grid.top)
        assert (np.abs(codes - nearest) <= 0.5 + 1e-4).all()
        assert len(np.unique(codes)) == grid.top + 1  # ranges are used whole

    @pytest.mark.parametrize("implementation", ["xla", "interpret"])
    def test_codes_are_the_references_own(self, implementation):
        arguments = workload((), 32, 256, groups=2).arguments(jax.random.key(5))
        found, expected = (
            gptq_block(*arguments, grid=Integers(bits=4), implementation=i)
            for i in (implementation, "reference")
        )
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], atol=1e-5)

    def test_two_rows_of_a_thread_are_no_others(self, monkeypatch):
        problem = workload((), 16, 512)
        arguments = problem.arguments(jax.random.key(1))
        of_one = problem.run(*arguments, implementation="interpret")
        monkeypatch.setattr(mosaic, "SMS", 1)
        assert rows_of_a_thread(1, 512) == 2
        for ours, other in zip(
            problem.run(*arguments, implementation="interpret"), of_one, strict=True
        ):
            np.testing.assert_array_equal(ours, other)

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    def test_with_a_diagonal_factor_it_rounds(self, implementation):
        w, u, scale, zero, group = workload((), 8, 128).arguments(jax.random.key(0))
        codes, error = gptq_block(
            w, jnp.eye(8) * 4, scale, zero, group, grid=Integers(bits=4),
            implementation=implementation,
        )  # fmt: skip
        expected = jnp.clip(jnp.round(w / scale[group]) + zero[group], 0, 15)
        np.testing.assert_array_equal(codes, expected)
        np.testing.assert_allclose(error, (w - (expected - zero) * scale) / 4, atol=1e-6)

    @pytest.mark.parametrize("implementation", ["reference", "xla"])
    def test_what_goes_is_zero_and_all_of_it_an_error(self, implementation):
        """What stays, unrounded, leaves none but takes those of others on."""
        w, u, scale, zero, group, keep = workload((), 16, 32, kept=0.5).arguments(jax.random.key(0))
        values, error = gptq_block(
            w, u, scale, zero, group, keep, grid=UNROUNDED, implementation=implementation
        )
        left = w - jnp.triu(u, 1).T @ error
        np.testing.assert_allclose(values, jnp.where(keep, left, 0), atol=1e-5)
        expected = jnp.where(keep, 0, left / jnp.diag(u)[:, None])
        np.testing.assert_allclose(error, expected, atol=1e-5)
        codes, _ = gptq_block(
            w, u, scale, zero, group, keep, grid=Integers(bits=4), implementation=implementation
        )
        assert codes.dtype == jnp.uint8 and not codes[~keep].any()

    @pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
    def test_what_is_below_the_diagonal_counts_as_zero(self, implementation):
        w, u, *rest = workload((), 16, 128).arguments(jax.random.key(0))
        run = lambda u: gptq_block(  # noqa: E731
            w, u, *rest, grid=Integers(bits=4), implementation=implementation
        )
        for ours, other in zip(run(u), run(u + jnp.tril(jnp.ones_like(u), -1)), strict=True):
            np.testing.assert_array_equal(ours, other)

    @pytest.mark.parametrize("whole, zero_dtype", [(True, "uint8"), (False, "float16")])
    def test_integers_are_those_of_the_formats_bit_for_bit(self, whole, zero_dtype):
        format = Format(element=Integer(bits=5, zero_dtype=zero_dtype))
        x = jax.random.normal(jax.random.key(0), (1000,)) * 20
        grid = Integers(bits=5, whole_zero=whole)
        codes = format.encode(x, jnp.float32(0.7), jnp.float32(13))
        np.testing.assert_array_equal(grid.encode(x, jnp.float32(0.7), jnp.float32(13)), codes)
        np.testing.assert_array_equal(
            grid.decode(codes, jnp.float32(0.7), jnp.float32(13)),
            format.decode(codes, jnp.float32(0.7), jnp.float32(13)),
        )

    def test_it_maps_over_matrices_like_a_batch_of_them(self):
        grid = Integers(bits=4)
        arguments = workload((2,), 8, 128).arguments(jax.random.key(0))
        for implementation in ("xla", "interpret"):
            run = lambda *a, i=implementation: gptq_block(*a, grid=grid, implementation=i)  # noqa: E731
            for ours, other in zip(jax.vmap(run)(*arguments), run(*arguments), strict=True):
                np.testing.assert_array_equal(ours, other)

    @pytest.mark.aot
    def test_it_is_one_kernel_whatever_the_number_of_columns(self):
        workload = WORKLOADS["14336x128"]
        program = aot.compile(
            lambda *a: workload.run(*a, implementation="mosaic"), *shapes(workload)
        )
        entry = program.text[program.text.index("ENTRY") :]
        assert len(program.kernels) == 1 and "fusion(" not in entry and "while(" not in entry


@pytest.mark.parametrize(
    "b, r, expected", [(1, 14336, 1), (1, 28672, 2), (8, 4096, 2), (9, 2176, 1)]
)
def test_a_thread_has_two_rows_where_every_sm_has_some_even_so(b, r, expected):
    assert rows_of_a_thread(b, r) == expected


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(c=8, r=128, grid=E4M3), "takes integer grids, and grid=Functions"),
        (dict(c=8, r=128, dtype="bfloat16"), "takes w in float32, and w.dtype=bfloat16"),
        (dict(c=12, r=128), r"columns in multiples of 8 up to 128, and w.shape=\(12, 128\)"),
        (dict(c=136, r=128), r"columns in multiples of 8 up to 128, and w.shape=\(136, 128\)"),
        (dict(c=8, r=128, kept=0.5), "takes blocks of which all numbers stay, and keep is given"),
        (dict(c=8, r=96), r"takes rows in multiples of 128, and w.shape=\(8, 96\)"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_with_the_reason(settings, reason):
    problem = workload((), **settings)
    with pytest.raises(ValueError, match=reason):
        problem.run(*problem.arguments(jax.random.key(0)), implementation="interpret")


def test_grids_of_no_known_width_are_refused():
    with pytest.raises(ValueError, match="bits=9 must be from 2 to 8"):
        Integers(bits=9)
