"""QTIP against a port of the official code, its theory, and rounding.

The deviations are those of papers/qtip.md.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algorithms import incoherence, trellis
from algorithms.formats import integer
from algorithms.quantization.gptq import gptq
from algorithms.quantization.qtip import QTIPConfig, qtip, quantize_rotated, quantize_weight
from algorithms.quantization.rtn import rtn
from algorithms.tensors.trellis import TrellisTensor
from tests.algorithms.quantization import qtip_official as official
from tests.algorithms.quantization.test_gptq import equations

SMALL: dict[str, Any] = dict(state_bits=8, tile=8, row_block=8)


def layer(seed=0, o=16, i=64, n=96):
    """W [o, i] with heavy tails and correlated inputs X [n, i]."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(5, size=(o, i))
    x = rng.normal(size=(n, i)) @ rng.normal(size=(i, i)) * np.exp(rng.normal(size=i) / 2)
    return w, x


def compress(method, w, x, key=0):
    stats = method.observe(method.init(x.shape[1]), jnp.asarray(x, jnp.float32))
    keys = (jax.random.key(key),) if method.seeded else ()
    w = jnp.asarray(w, jnp.float32)
    tensor = jax.jit(method.compress)(w, stats, *keys)
    return tensor, float(method.error(w, tensor.dequantize(), stats))


@pytest.mark.parametrize("code", trellis.CODES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.some(3)
def test_equals_the_official_code(x64, bits, code):
    """Deviation 2: a scale for each row of tiles, which is the official one of those rows."""
    w, x = layer(bits)
    config = QTIPConfig(bits=bits, code=code, state_bits=8, tile=8, row_block=None)
    tensor = quantize_rotated(jnp.asarray(w), jnp.asarray(x.T @ x), config)
    lut = np.asarray(trellis.levels(code, 8), np.float64)
    options = dict(K=bits, L=8, td=8, scale_override=0.9, sigma_reg=0.01)
    for n in range(2):
        rows = slice(8 * n, 8 * n + 8)
        hat, words, scale = official.quantize_weight(w[rows], x.T @ x, lut, **options)
        packed = words.astype(">u2").view(np.uint8).reshape(1, 8, -1)
        np.testing.assert_array_equal(tensor.packed[n : n + 1], packed)
        np.testing.assert_allclose(tensor.scale[n], scale, rtol=1e-6)
        np.testing.assert_allclose(tensor.dequantize()[rows], hat, atol=1e-6)


def test_it_is_the_rotation_that_the_key_draws_and_walks_in_its_coordinates(x64):
    w, x = layer(4)
    config = QTIPConfig(**SMALL)
    tensor = quantize_weight(jnp.asarray(w), jnp.asarray(x.T @ x), jax.random.key(3), config)
    tensor.validate()
    signs = tensor.output_signs(), tensor.input_signs()
    rotated = incoherence.process(jnp.asarray(w), jnp.asarray(x.T @ x), *signs, row_block=8)
    inner = quantize_rotated(*rotated, config)
    np.testing.assert_array_equal(tensor.weight.packed, inner.packed)
    dense = incoherence.unrotate_weight(inner.dequantize(), *signs[::-1], row_block=8)
    np.testing.assert_allclose(tensor.dequantize(), dense, atol=1e-12)


def test_a_diagonal_hessian_gives_each_tile_its_nearest_walk(x64):
    w, _ = layer(5)
    config = QTIPConfig(state_bits=8, tile=8, row_block=None)
    tensor = quantize_rotated(jnp.asarray(w), jnp.diag(jnp.arange(1.0, 65)), config)
    tiles = (w / np.repeat(tensor.scale, 8)[:, None]).reshape(2, 8, 8, 8).swapaxes(1, 2)
    levels = trellis.levels("3inst", 8).astype(float)
    states = trellis.quantize(jnp.asarray(tiles.reshape(16, 64)), levels, 2)
    np.testing.assert_array_equal(tensor.states().reshape(16, 64), states)


def test_feedback_trades_weight_error_for_output_error():
    w, x = layer(6)
    h = jnp.asarray(x.T @ x, jnp.float32)
    config = QTIPConfig(state_bits=8, tile=8)
    with_h, without = (
        np.asarray(quantize_rotated(jnp.asarray(w, jnp.float32), g, config).dequantize()) - w
        for g in (h, jnp.eye(64))
    )
    assert np.sum(with_h**2) > np.sum(without**2)
    assert np.sum((with_h @ x.T) ** 2) < 0.7 * np.sum((without @ x.T) ** 2)


def test_beats_gptq_and_rounding_at_more_bits():
    w, x = layer(7, o=64, n=200)
    tensor, error = compress(qtip(state_bits=10, row_block=32), w, x)
    coarse = integer(bits=2, group_size=32)
    rounded, rounding = compress(gptq(format=coarse), w, x)
    assert tensor.storage_bits() < rounded.storage_bits() and error < 0.7 * rounding
    plain = rtn(format=coarse).compress(jnp.asarray(w, jnp.float32), None)
    far = (np.asarray(plain.dequantize()) - w) @ x.T
    assert error < 0.2 * np.sum(far**2) / np.sum((w @ x.T) ** 2)


def test_more_bits_and_more_states_lower_the_error():
    w, x = layer(8)

    def error(**options):
        return compress(qtip(tile=8, **options), w, x)[1]

    assert error(state_bits=10) < error(state_bits=8)
    assert error(state_bits=8, bits=3) < 0.4 * error(state_bits=8)


def test_stores_two_bits_a_weight_scales_and_signs():
    w, x = layer(9)
    tensor, _ = compress(qtip(**SMALL), w, x)
    assert tensor.storage_bits() == 2 * 16 * 64 + 2 * 32 + 64 + 16
    assert tensor.weight.packed.shape == (2, 8, 16) and tensor.weight.packed.dtype == jnp.uint8
    assert tensor.dequantize().dtype == jnp.float32 and tensor.shape == (16, 64)


def test_readers_come_apart_between_tiles_and_blocks():
    w, x = layer(10, o=24)
    tensor, _ = compress(qtip(**SMALL), w, x)
    pieces = tensor.split([8, 16])
    for piece in pieces:
        piece.validate()
    joined = jnp.concatenate([piece.dequantize() for piece in pieces])
    # To rounding: CPUs differ in whether a product of fewer rows sums in the same order.
    np.testing.assert_allclose(joined, tensor.dequantize(), atol=2e-6)
    with pytest.raises(ValueError, match=r"rows=\[12, 12\] must be multiples of tile=8"):
        tensor.weight.split([12, 12])


def test_methods_say_which_rows_belong_together():
    assert qtip().row_block == 64
    assert qtip(row_block=24, tile=16).row_block == 48
    assert qtip(row_block=None).row_block == 16


@pytest.mark.parametrize("o", [1, 20, 24])
def test_rows_that_do_not_fill_the_last_tile(x64, o):
    """Padded with zeros, which change nothing: rows are independent but for their walk."""
    w, x = layer(11, o=o)
    config = QTIPConfig(state_bits=8, tile=16, row_block=None)
    tensor = quantize_rotated(jnp.asarray(w), jnp.asarray(x.T @ x), config)
    tensor.validate()
    assert tensor.dequantize().shape == (o, 64)
    rms = np.sqrt(np.mean(w[o // 16 * 16 :] ** 2 if o % 16 else w[-16:] ** 2))
    unit = 0.9 * np.sqrt(np.mean(np.asarray(trellis.levels("3inst", 8), np.float64) ** 2))
    np.testing.assert_allclose(tensor.scale[-1], rms / unit, rtol=1e-6)
    error = np.sum(((np.asarray(tensor.dequantize()) - w) @ x.T) ** 2)
    assert error < 0.2 * np.sum((w @ x.T) ** 2)
    halves = tensor.split([16, o - 16]) if o > 16 else tensor.split([o])
    np.testing.assert_array_equal(
        jnp.concatenate([half.dequantize() for half in halves]), tensor.dequantize()
    )


def test_computing_on_the_compressed_form_is_computing_on_the_dense_one():
    w, x = layer(12)
    tensor, _ = compress(qtip(**SMALL), w, x)
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_allclose(tensor.matmul(x), x @ tensor.dequantize().T, rtol=1e-4, atol=1e-3)


def test_jit_equals_eager():
    w, x = layer(13)
    method = qtip(**SMALL)
    assert method.init is not None and method.observe is not None
    stats = method.observe(method.init(64), jnp.asarray(x, jnp.float32))
    eager: Any = method.compress(jnp.asarray(w, jnp.float32), stats, jax.random.key(0))
    jitted, _ = compress(method, w, x)
    # Compilers may contract a product and a sum, which moves what lies on a tie.
    same = jax.tree.map(lambda a, b: float((a == b).mean()), eager, jitted)  # one structure
    assert same.weight.packed > 0.9 and same.signs_in == same.signs_out == 1
    other, _ = compress(method, w, x, key=1)
    assert not (other.weight.packed == jitted.weight.packed).all()


def test_the_graph_does_not_grow_with_width():
    config = QTIPConfig(state_bits=8)

    def size(o, i):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((o, i), (i, i))]
        return equations(
            jax.make_jaxpr(lambda w, h: quantize_rotated(w, h, config).packed)(*shapes).jaxpr
        )

    assert size(64, 64) == size(64, 640) == size(4160, 64) < 500


def test_finite_on_dead_inputs_and_rows_and_layers_of_zeros():
    w, x = layer(14)
    x[:, 7] = 0
    method = qtip(**SMALL)
    for inputs in (x, np.zeros_like(x)):
        tensor, error = compress(method, w, inputs)
        assert jnp.isfinite(tensor.dequantize()).all() and np.isfinite(error)
    tensor, error = compress(method, np.zeros_like(w), x)
    assert error == 0 and not tensor.dequantize().any()
    w[8:] = 0  # whole blocks of rows, and whole tiles, of zeros stay zeros
    tensor, error = compress(method, w, x)
    assert not tensor.dequantize()[8:].any() and np.isfinite(error)


def test_a_hessian_that_is_not_positive_definite_gives_nan_and_damping_mends_it():
    w, _ = layer(15)
    h, key = jnp.ones((64, 64)), jax.random.key(0)
    w = jnp.asarray(w, jnp.float32)
    config = QTIPConfig(**SMALL)
    undamped = dataclasses.replace(config, damping=0.0)
    assert jnp.isnan(quantize_weight(w, -h, key, undamped).weight.scale).all()
    assert jnp.isfinite(quantize_weight(w, h, key, config).dequantize()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bits=1), "bits=1 must be from 2 to 4"),
        (dict(bits=5), "bits=5 must be from 2 to 4"),
        (dict(state_bits=17), "state_bits=17 must be from 8 to 16"),
        (dict(code="2mad"), "code='2mad' must be one of 3inst, 1mad, lut"),
        (dict(tile=0), "tile=0 must be positive"),
        (dict(tile=5), "25 steps of bits=2 does not fill whole bytes"),
        (dict(tile=2), "4 steps of bits=2 is shorter than state_bits=12"),
        (dict(spread=0.0), "spread=0.0 must be positive"),
        (dict(row_block=0), "row_block=0 must be positive, or null"),
        (dict(damping=-0.1), "damping=-0.1 must not be negative"),
    ],
)
def test_refuses_settings_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        qtip(**options)


def test_refuses_columns_that_tiles_do_not_divide():
    sentence = r"tile=16 must divide the input dimension of w, w.shape=\(16, 40\)"
    with pytest.raises(ValueError, match=sentence):
        quantize_weight(jnp.ones((16, 40)), jnp.eye(40), jax.random.key(0), QTIPConfig())


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"code": "2mad"}, "code='2mad' must be one of"),
        ({"state_bits": 20}, "state_bits=20 must be from 8 to 16"),
        ({"rows": 40}, r"does not hold 40 rows in tiles of 8 x 8 weights of 2 bits"),
        ({"bits": 4}, "does not hold 16 rows in tiles of 8 x 8 weights of 4 bits"),
        ({"scale": jnp.ones(3)}, r"scale.shape=\(3,\) does not hold 2 rows of tiles"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, sentence):
    packed = jnp.zeros((2, 6, 16), jnp.uint8)
    tensor = TrellisTensor(packed, jnp.ones(2), 16, 2, 8, "lut", 8)
    tensor.validate()
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tensor, **change).validate()
