"""QuIP# against a port of the official code, its theory, and rounding.

The deviations are those of papers/quip_sharp.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import incoherence
from algorithms.hessian import HessianStats
from algorithms.quantization.quip_sharp import QuIPSharpConfig, quantize_rotated, quip_sharp
from algorithms.tensors.rotated import RotatedTensor
from tests.algorithms.quantization import quip_sharp_official as official

KEY = jax.random.key(0)
quantize = jax.jit(quantize_rotated, static_argnames="config")
process = jax.jit(incoherence.process, static_argnums=4)


def layer(seed=0, o=24, i=48, n=96):
    """W [o, i] and correlated inputs X [n, i]; 48 has a Hadamard matrix, of order 12 times 4."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) * np.exp(rng.normal(size=i) / 2)
    return rng.normal(size=(o, i)), x


@functools.cache
def jitted(**options):
    return jax.jit(quip_sharp(**options).compress)


def compress(w, x, key=KEY, **options) -> RotatedTensor:
    """What the method makes of float32 W and X."""
    gram = jnp.asarray(x.T @ x, jnp.float32)
    return jitted(**options)(jnp.asarray(w, jnp.float32), HessianStats(gram), key)


def output_error(w, x, approximation):
    delta = np.asarray(approximation, np.float64) - w
    return np.sum((delta @ x.T) ** 2) / np.sum((w @ x.T) ** 2)


def rounded(w, bits, group_size):
    """Round to nearest on a grid from least to largest, in groups."""
    groups = w.reshape(len(w), -1, group_size)
    low = np.minimum(groups.min(2, keepdims=True), 0)
    step = (np.maximum(groups.max(2, keepdims=True), 0) - low) / (2**bits - 1)
    return (np.round((groups - low) / step) * step + low).reshape(w.shape)


@pytest.mark.parametrize(("bits", "damping"), [(2, 0.01), (2, 1.0), (3, 1e-3), (4, 0.01)])
@pytest.mark.some(2)
def test_equals_the_official_code_on_rotated_weights(x64, bits, damping):
    w, x = layer(bits)
    config = QuIPSharpConfig(bits=bits, damping=damping)
    tensor = quantize(jnp.asarray(w), jnp.asarray(x.T @ x), config)
    rms = np.sqrt(np.mean(w**2, 1)) / official.OPT_SCALE[bits]
    np.testing.assert_allclose(tensor.scale, rms, rtol=2**-11)  # deviation 4: in float16

    scale = np.asarray(tensor.scale, np.float64)
    codes, residual, expected = official.quantize_layer(w, x.T @ x, scale, bits, damping)
    np.testing.assert_array_equal(tensor.codes, codes)
    if residual is not None:
        np.testing.assert_array_equal(tensor.residual, residual)
    np.testing.assert_allclose(tensor.dequantize(), expected, atol=1e-5)


def test_is_the_rotated_problem_rotated_back(x64):
    w, x = layer(1)
    w, gram = jnp.asarray(w), jnp.asarray(x.T @ x)
    tensor = jitted(bits=3)(w, HessianStats(gram), KEY)
    tensor.validate()
    signs = tensor.output_signs(), tensor.input_signs()
    rotated, h = process(w, gram, *signs, tensor.row_block)
    inner = quantize(rotated, h, QuIPSharpConfig(bits=3))
    np.testing.assert_array_equal(tensor.weight.codes, inner.codes)
    delta, inside = w - tensor.dequantize(), rotated - inner.dequantize()
    # Lemma 3.1: the error does not know in which coordinates it is measured.
    np.testing.assert_allclose(
        jnp.sum(delta @ gram * delta), jnp.sum(inside @ h * inside), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.some(1)
def test_beats_rounding_at_more_bits(seed):
    """2 bits and 1/3 for each row's scale against 2 bits and 32 for each group of 16."""
    w, x = layer(seed)
    ours = output_error(w, x, compress(w, x).dequantize())
    assert ours < 0.7 * output_error(w, x, rounded(w, 2, 16))
    assert ours > 3 * output_error(w, x, compress(w, x, bits=3).dequantize())
    assert output_error(w, x, compress(w, x, bits=4).dequantize()) < 0.15 * ours


def test_weights_that_stand_out_stand_out_no_more():
    """What rotations are for: without them the same codebook fails on outliers."""
    w, x = layer(4)
    w[np.arange(24), np.random.default_rng(4).integers(0, 48, 24)] = 20
    h = jnp.asarray(x.T @ x, jnp.float32)
    plain = quantize(jnp.asarray(w, jnp.float32), h, QuIPSharpConfig()).dequantize()
    rotated = compress(w, x)
    assert output_error(w, x, rotated.dequantize()) < 0.4 * output_error(w, x, plain)
    signs = rotated.output_signs(), rotated.input_signs()
    inside, _ = process(jnp.asarray(w, jnp.float32), h, *signs, 8)
    assert incoherence.incoherence(inside) < 0.7 * incoherence.incoherence(jnp.asarray(w))


def test_the_key_draws_the_signs():
    w, x = layer(5)
    first, again, other = (compress(w, x, key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first.dequantize(), again.dequantize())
    assert (first.dequantize() != other.dequantize()).any()
    assert (first.signs_in != other.signs_in).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_counts_every_bit(bits):
    w, x = layer(7)
    tensor = compress(w, x, bits=bits)
    tensor.validate()
    assert tensor.storage_bits() == 24 * 48 * bits + 24 * 16 + 24 + 48


def test_readers_are_taken_apart_by_blocks_of_rows():
    w, x = layer(8)
    tensor = compress(w, x)
    assert tensor.row_block == 8  # the largest that divides both 24 and 64
    whole = np.asarray(tensor.dequantize())
    pieces = [np.asarray(piece.dequantize()) for piece in tensor.split([16, 8])]
    # To rounding: CPUs differ in whether a product of fewer rows sums in the same order.
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=2e-6)
    with pytest.raises(ValueError, match="must be multiples of row_block=8"):
        tensor.split([14, 10])
    assert [method.row_block for method in (quip_sharp(), quip_sharp(row_block=None))] == [64, 1]


def test_finite_on_dead_inputs_and_rows_of_zeros():
    w, x = layer(9)
    x[:, [7, 20]] = 0
    w[3] = 0
    assert jnp.isfinite(compress(w, x).dequantize()).all()
    unmixed = np.asarray(compress(w, x, row_block=None).dequantize())
    assert not unmixed[3].any() and unmixed[4].any()  # a row of zeros is kept where rows stay apart
    w[:, [7, 20]] = 1e3  # free, so it must not coarsen the others
    np.testing.assert_array_equal(compress(w, x, row_block=None).dequantize(), unmixed)


def test_layers_of_zeros_and_dead_layers_are_zeros():
    w, x = layer(10)
    assert not compress(np.zeros_like(w), x).dequantize().any()
    assert not compress(w, np.zeros_like(x)).dequantize().any()


def test_a_hessian_that_is_not_positive_definite_gives_nan_and_damping_mends_it():
    w, _ = layer(11)
    ones = np.ones((1, 48))  # of rank one
    assert jnp.isnan(compress(w, ones, damping=0.0).weight.scale).all()
    assert jnp.isfinite(compress(w, ones).dequantize()).all()


def equations(jaxpr):
    """The number of equations of a traced graph, those inside its loops and calls included."""
    inner = (
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=_graph)
    )
    return len(jaxpr.eqns) + sum(equations(getattr(p, "jaxpr", p)) for p in inner if _graph(p))


def _graph(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_graph_does_not_grow_with_width(bits):
    def size(i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, i), (i, i))]
        config = QuIPSharpConfig(bits=bits)
        return equations(jax.make_jaxpr(lambda w, h: quantize_rotated(w, h, config))(*shapes).jaxpr)

    assert size(480) == size(48) < 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=5), "bits=5 must be 2, 3 or 4"),
        (dict(damping=-0.1), "damping=-0.1 must not be negative"),
        (dict(codebook_scale=0.0), "codebook_scale=0.0 must be positive"),
        (dict(row_block=0), "row_block=0 must be positive"),
    ],
)
def test_refuses_settings_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        quip_sharp(**options)


@pytest.mark.parametrize(("i", "message"), [(12, "multiple of 8"), (472, "Hadamard")])
def test_refuses_inputs_that_cannot_be_coded(i, message):
    stats = HessianStats(jnp.eye(i))
    with pytest.raises(ValueError, match=message):
        quip_sharp().compress(jnp.ones((8, i)), stats, KEY)
