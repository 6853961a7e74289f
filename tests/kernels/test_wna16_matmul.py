import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu

from algorithms import minifloat
from kernels import aot, dispatch
from kernels.packing import pack
from kernels.wna16_matmul import codes, kernel, plan, registers, wna16_matmul
from kernels.wna16_matmul.shapes import FORMS, LAYERS, WORKLOADS, Form, arguments, workload
from kernels.workload import shapes
from tests.kernels.suite import KernelSuite, close, distance, widened

INTEGERS = {
    f"{bits} bits, zero {zero}": Form("int", bits, 0, "float32", zero)
    for bits, zero in zip(
        range(2, 9), [None, "uint8", "float16", *2 * [None, "uint8"]], strict=True
    )
}
H200 = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0"
)  # as JAX describes one


def case(form, m, i, o, group=None, dtype="bfloat16", tolerance=4e-3, change=None):
    """A form on small shapes. change(x, packed, scale, zero, divisor): other arguments."""
    form = form._replace(group=group or form.group)
    made = workload(form, m, i, o)

    def make(key):
        given = arguments(key, form, m, i, o, dtype)
        return given if change is None else change(*given)

    return made._replace(arguments=make, tolerance=tolerance)


def empty_and_tiny(x, packed, scale, *rest):
    return (x.at[1].set(0).at[2].set(1e-38), packed, scale.at[0].set(0), *rest)


class TestWna16Matmul(KernelSuite):
    everywhere = {
        **{f"{name}, {m}x{i}x{o}": case(form, m, i, o, group, "float32", 2e-6)
           for (name, form), (m, i, o, group) in zip(
               INTEGERS.items(), 7 * [(1, 6, 3, 6), (5, 24, 7, 8), (6, 35, 1, 7)], strict=False)},
        **{f"{name}, float32": case(form, 5, 256, 3, dtype="float32", tolerance=2e-6)
           for name, form in FORMS.items() if name != "W2"},
        **{f"{name}, bfloat16": case(form, 20, 256, 32) for name, form in FORMS.items()},
        "one column": case(FORMS["W8"], 1, 1, 1, 1, "float32", 2e-6),
        "empty, tiny": case(FORMS["W4"], 4, 128, 8, dtype="float32", tolerance=2e-6,
                            change=empty_and_tiny),
    }  # fmt: skip
    small = {
        "W4": case(FORMS["W4"], 5, 512, 128),
        "W4 zero, g32": case(FORMS["W4 zero"], 8, 128, 128, 32),
        "W4 zero in float16, two tiles": case(Form("int", 4, 64, zero="float16"), 1, 128, 256),
        "W8 zero": case(FORMS["W8"]._replace(zero="uint8"), 16, 64, 128, 16),
        "W3, g32": case(FORMS["W3"], 8, 256, 128, 32),
        "W2": case(FORMS["W2"], 8, 256, 128),
        "NVFP4": case(FORMS["NVFP4"], 8, 128, 128),
        "MXFP4": case(FORMS["MXFP4"], 8, 128, 128),
        "NF4": case(FORMS["NF4"], 8, 128, 128),
    }
    real = WORKLOADS

    @pytest.mark.workloads("everywhere")
    def test_gradients_agree_with_float64(self, workload):
        for implementation in self.implementations:
            close_gradients(workload, implementation)

    @pytest.mark.parametrize("name", ["W4 zero, g32", "NVFP4"])
    def test_gradients_of_the_kernel_agree_with_float64_when_interpreted(self, name):
        close_gradients(self.small[name], "interpret")

    def test_the_gradients_of_the_kernel_are_all_those_of_the_xla_form(self):
        """By scales and real zero points too, which training wants."""
        workload = self.small["W4 zero in float16, two tiles"]
        x, packed, *tables, _ = workload.arguments(jax.random.key(1))

        def pulled(implementation):
            def f(x, scale, zero):
                return workload.run(x, packed, scale, zero, implementation=implementation)

            y, pull = jax.vjp(f, x, *tables)
            return pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype))

        for ours, theirs in zip(pulled("interpret"), pulled("xla"), strict=True):
            assert ours.dtype == theirs.dtype and jnp.abs(theirs).max() > 0
            np.testing.assert_array_equal(ours, theirs)


def close_gradients(workload, implementation):
    """By x, of a sum that no errors cancel in; in bfloat16 a cotangent is not exact, so not here
    by those of the suite, whose cotangents follow the type.
    """
    arguments = workload.arguments(jax.random.key(2))

    def by_x(implementation, x, *rest):
        y, pull = jax.vjp(lambda x: workload.run(x, *rest, implementation=implementation), x)
        signs = jnp.where(jnp.arange(y.size) % 3 == 0, -1, 1).reshape(y.shape)
        return pull(signs.astype(y.dtype))[0]

    found = jax.jit(by_x, static_argnums=0)(implementation, *arguments)
    with jax.enable_x64(True):
        exact = jax.jit(by_x, static_argnums=0)("reference", *widened(arguments))
    assert distance(found, exact) < 2 * workload.tolerance, implementation


@pytest.mark.parametrize("m", [1, 7, 16])
@pytest.mark.parametrize("name", ["W4 zero", "W3", "NVFP4", "MXFP4", "NF4", "5 bits, zero None"])
@pytest.mark.some(6)
def test_the_form_for_a_gpu_agrees_with_float64(name, m):
    form = {**FORMS, **INTEGERS}[name]
    with dispatch.compiling_for(H200):
        close(case(form, m, 256, 24, form.group or 32), "xla")


@pytest.mark.parametrize("group", [7, 35])
def test_the_form_for_a_gpu_takes_groups_that_begin_inside_a_byte(group):
    with dispatch.compiling_for(H200):
        close(case(FORMS["W4"], 2, 35, 3, group, "float32", 2e-6), "xla")


@pytest.mark.parametrize("implementation", ["reference", "xla", "xla on a GPU"])
def test_what_is_infinite_shows(implementation):
    x, *rest = arguments(jax.random.key(0), FORMS["W4"], 3, 128, 4, "float32")
    target = H200 if implementation == "xla on a GPU" else jax.devices()[0]
    with dispatch.compiling_for(target):
        y = wna16_matmul(
            x.at[1, 2].set(jnp.inf), *rest, bits=4, implementation=implementation.split()[0]
        )
    assert jnp.isfinite(y[jnp.array([0, 2])]).all() and not jnp.isfinite(y[1]).any()


def test_leading_axes_are_kept():
    x, *rest = arguments(jax.random.key(0), FORMS["W4"], 6, 128, 4, "float32")
    y = wna16_matmul(x.reshape(2, 3, 128), *rest, bits=4)
    np.testing.assert_array_equal(y.reshape(6, 4), wna16_matmul(x, *rest, bits=4))
    assert wna16_matmul(x[0], *rest, bits=4).shape == (4,)


def test_levels_are_those_of_the_algorithms():
    fp4 = minifloat.E2M1.decode(jnp.arange(16, dtype=jnp.uint8))
    np.testing.assert_array_equal(np.float32(codes.LEVELS["fp4"]), fp4)
    np.testing.assert_array_equal(np.float32(codes.LEVELS["nf4"]), minifloat.NF4_LEVELS)


@pytest.mark.parametrize("kind, bits", [*(("int", b) for b in plan.BITS), ("fp4", 4), ("nf4", 4)])
def test_every_code_is_decoded_as_a_word(kind, bits):
    """In every place of a word, and to the nearest bfloat16."""
    order = codes.order(kind, bits)
    width = max(2**bits, order.codes) * registers.THREADS
    every = (jnp.arange(64)[:, None] + jnp.arange(width)[None]).astype(jnp.uint8) % 2**bits
    packed = pack(every, bits).reshape(64, -1, 4)
    words = jax.lax.bitcast_convert_type(packed, jnp.uint32)
    found = jax.jit(lambda w: codes.decode_words(w, kind, order, interpret=True))(words)
    expected = order.of(codes.decode(every, kind, jnp.float32))
    if kind == "int":
        expected -= 2 ** (bits - 1)
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))


@pytest.mark.parametrize("code", [0, 1, 7, 127, 128, 254, 255])
def test_scales_in_e8m0_are_powers_of_two(code):
    found = kernel.as_float(jnp.uint8(code))
    expected = jax.lax.bitcast_convert_type(jnp.uint8(code), jnp.float8_e8m0fnu).astype(jnp.float32)
    np.testing.assert_array_equal(found, expected)


def held(layout, shape):
    """By thread: the numbers of a table 0, 1, … of this shape in its registers [r, v]."""
    table = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        rows = table.ndim - len(tile)
        split = [n for d, t in zip(table.shape[rows:], tile, strict=True) for n in (d // t, t)]
        table = table.reshape(*table.shape[:rows], *split)
        axes = [*range(rows, table.ndim, 2), *range(rows + 1, table.ndim, 2)]
        table = table.transpose(*range(rows), *axes)
    for warp in range(4):
        for lane in range(32):
            at = [slice(None)] * table.ndim
            for index, dims in ((warp, layout.warp_dims), (lane, layout.lane_dims)):
                for dim in reversed(dims):
                    size = table.shape[dim] if isinstance(dim, int) else dim.times
                    index, here = divmod(index, size)
                    if isinstance(dim, int):
                        at[dim] = slice(here, here + 1)
            yield np.moveaxis(table[tuple(at)], layout.vector_dim, -1).reshape(
                -1, layout.vector_length
            )


class TestRegisters:
    """What the interpreter does not run: each thread's registers are those of the operand."""

    def test_pairs_lie_side_by_side(self):
        pairs = np.arange(4 * 64 * 8, dtype=np.uint32).reshape(4, 64, 8)
        meant = registers.operand(list(jnp.asarray(pairs)), interpret=True)
        meant = jax.lax.bitcast_convert_type(meant.reshape(64, 32, 2), jnp.uint32)
        meant = np.asarray(meant).reshape(-1)
        words = held(registers.WORDS.to_mgpu(), (64, 8))
        for here, there in zip(words, held(mgpu.WGMMA_LAYOUT, (64, 64)), strict=True):
            found = registers.side_by_side([pair.reshape(-1)[here[:, 0]] for pair in pairs])
            np.testing.assert_array_equal(found.reshape(-1), meant[there[:, 0] // 2])
            np.testing.assert_array_equal(there[:, 1], there[:, 0] + 1)

    def test_words_of_a_thread_come_apart(self):
        order, table = registers.Order(3), np.arange(64 * 24, dtype=np.uint32).reshape(64, 24)
        meant = registers.parts(jnp.asarray(table), order, interpret=True)
        together = held(registers._layout(12, 3).to_mgpu(), (64, 24))
        for here, there in zip(together, held(registers.WORDS.to_mgpu(), (64, 8)), strict=True):
            found = registers.parts_of(here[:, 0], 3)
            for part, words in zip(found, meant, strict=True):
                np.testing.assert_array_equal(part.reshape(-1), np.asarray(words).flat[there[:, 0]])

    @pytest.mark.parametrize("bits, group", [(4, 16), (4, 32), (4, 64), (8, 4), (8, 64), (2, 32),
                                             (3, 32), (3, 64), (3, 128)])  # fmt: skip
    def test_what_a_group_shares_is_beside_its_codes(self, bits, group):
        order, columns = registers.Order(bits), 128
        table = np.arange(64 * (columns // group)).reshape(64, -1)
        meant = registers.shared(jnp.asarray(table), group, order, columns, interpret=True)
        width = max(registers.THREADS * order.codes // group, 1)
        narrow = held(registers._layout(width).to_mgpu(), table.shape)
        for here, there in zip(narrow, held(mgpu.WGMMA_LAYOUT, (64, columns)), strict=True):
            found = registers.repeated(here[:, 0], columns // 8).reshape(-1)
            for column in (0, 1):
                np.testing.assert_array_equal(found, np.asarray(meant).flat[there[:, column]])


@pytest.mark.aot
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize("name", ["W4", "W4 zero", "W8", "W3", "NVFP4", "MXFP4", "NF4"])
def test_xla_writes_no_dense_weight_for_few_rows(name, m):
    i, o = LAYERS["8B qkv"]
    given = workload(FORMS[name], m, i, o)
    program = aot.compile(lambda *a: given.run(*a, implementation="xla"), *shapes(given))
    assert program.temporary < 1e6
    entry = program.text[program.text.index("\nENTRY") :]
    assert not re.search(rf"(?:bf16|f32)\[{o},\d\d", entry)


@pytest.mark.aot
def test_the_gradient_by_x_holds_one_dense_weight_at_most():
    given = WORKLOADS["8B qkv, W4, M=128"]
    x, *rest = shapes(given)

    def total(x, *rest):
        return given.run(x, *rest, implementation="mosaic").astype(jnp.float32).sum()

    program = aot.compile(jax.grad(total), x, *rest)
    i, o = LAYERS["8B qkv"]
    assert program.temporary < 1.25 * 2 * i * o


class TestWhatIsRefused:
    def problem(self, form="W4", m=2, i=256, o=128, **change):
        return arguments(jax.random.key(0), FORMS[form]._replace(**change), m, i, o)

    @pytest.mark.parametrize("settings, message", [
        (dict(bits=9), "bits=9 must be from 2 to 8"),
        (dict(bits=3), "needs 96 bytes"),
        (dict(bits=4, kind="fp8"), "kind='fp8' is not one of int, fp4, nf4"),
        (dict(bits=8, kind="nf4"), "kind='nf4' has bits=4, not bits=8"),
        (dict(bits=4, implementation="triton"), "implementation='triton' is not one of"),
    ])  # fmt: skip
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            wna16_matmul(*self.problem(), **settings)

    def test_shapes(self):
        x, packed, *_ = self.problem()
        with pytest.raises(ValueError, match="5 groups must divide the input dimension of x"):
            wna16_matmul(x, packed, jnp.ones((128, 5)), None, bits=4)
        zero = jnp.zeros((128, 4), jnp.uint8)
        with pytest.raises(ValueError, match="kind='fp4' has no zero point"):
            wna16_matmul(x, packed, jnp.ones((128, 4)), zero, bits=4, kind="fp4")

    @pytest.mark.parametrize("change, message", [
        (dict(m=129), "is for 1 to 128 rows of x, and there are 129"),
        (dict(o=64), "takes W's rows in multiples of 128, and there are 64"),
        (dict(i=160, group=32), "takes 4-bit columns in multiples of 128, and there are 160"),
        (dict(bits=5), "takes bits of 2, 3, 4 or 8, and bits=5"),
        (dict(i=384, group=96), "takes groups of 8 to 64 columns that divide 64"),
    ])  # fmt: skip
    def test_what_the_kernel_lacks(self, change, message):
        given = self.problem(**change)
        with pytest.raises(ValueError, match=message):
            wna16_matmul(*given, bits=change.get("bits", 4), implementation="interpret")

    def test_x_in_another_type(self):
        x, *rest = self.problem()
        with pytest.raises(ValueError, match="takes x in bfloat16, and x.dtype=float32"):
            wna16_matmul(x.astype("float32"), *rest, bits=4, implementation="interpret")


def test_dequantized_weights_are_not_kept_for_gradients():
    """Training beside packed weights would else need as much memory as beside dense ones."""
    form, (m, i, o) = FORMS["W4"], (5, 256, 32)
    x, *packed = arguments(jax.random.key(0), form, m, i, o, "float32")

    def backward(x):
        return jax.vjp(lambda x: wna16_matmul(x, *packed, bits=form.bits, kind=form.kind), x)[1]

    kept = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(backward, x))}
    assert kept and (o, i) not in kept and (i, o) not in kept
