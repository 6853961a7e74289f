"""Layers that round their input: what they round it to, and what they leave alone."""

from pathlib import Path

import hydra
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omegaconf import OmegaConf

from algorithms import formats, hessian
from algorithms.activations import quantized_inputs
from algorithms.elements import Integer
from algorithms.tensors import DenseTensor
from tests.algorithms.integers import gptq, rtn, stochastic_rounding

CONF = Path(__file__).parents[2] / "conf" / "activations"
CHOICES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "none")
TOKEN = formats.integer(bits=8, group_size=None, symmetric=True, scale_dtype="float32")
TENSOR = formats.Format(
    element=Integer(bits=8, symmetric=True), columns=None, rows=None, scale_dtype="float32"
)
METHOD = rtn(bits=4, group_size=8)


def layer(seed=0, o=5, i=16, n=12):
    """W and tokens of different sizes. A token's largest magnitude is that of a positive number:
    minus the largest lies between two codes, and the last bit decides.
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, i)) * np.exp(rng.normal(size=(n, 1)))
    x[:, 0] = 1.5 * np.abs(x).max(1)
    return jnp.asarray(rng.normal(size=(o, i)), jnp.float32), jnp.asarray(x, jnp.float32)


def observed(method, *batches):
    stats = method.init(batches[0].shape[1])
    for x in batches:
        stats = method.observe(stats, x)
    return stats


def symmetric(x, largest, bits=8):
    """A NumPy reference: 2^bits codes from -largest to largest, zero at the upper middle one."""
    step = 2 * np.asarray(largest, np.float64) / (2**bits - 1)
    codes = np.clip(
        np.round(np.asarray(x, np.float64) / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    )
    return codes * step


@pytest.mark.parametrize("bits", [4, 8])
def test_each_token_is_rounded_on_its_own(bits):
    format = formats.integer(bits=bits, group_size=None, symmetric=True, scale_dtype="float32")
    w, x = layer()
    tensor = quantized_inputs(format=format)(METHOD).compress(w, None)
    expected = symmetric(x, np.abs(x).max(1, keepdims=True), bits)
    np.testing.assert_allclose(tensor.rounded(x), expected, rtol=1e-5, atol=1e-6)
    alone = jnp.concatenate([tensor.rounded(token[None]) for token in x])
    np.testing.assert_allclose(tensor.rounded(x), alone, rtol=1e-6)
    windows = tensor.rounded(x.reshape(3, 4, 16))
    np.testing.assert_array_equal(windows.reshape(12, 16), tensor.rounded(x))


def test_a_layer_multiplies_the_rounded_input():
    w, x = layer(1)
    tensor = quantized_inputs(format=TOKEN)(METHOD).compress(w, None)
    rounded = symmetric(x, np.abs(x).max(1, keepdims=True))
    expected = rounded @ np.asarray(tensor.dequantize(), np.float64).T
    np.testing.assert_allclose(tensor.matmul(x), expected, rtol=1e-4, atol=1e-4)
    assert tensor.online
    assert np.abs(expected - np.asarray(x @ tensor.dequantize().T)).max() > 1e-3


def test_static_scales_are_those_of_calibration():
    """The largest magnitude over all batches, whatever the layer sees later."""
    w, x = layer(2)
    method = quantized_inputs(format=TENSOR, dynamic=False)(METHOD)
    tensor = method.compress(w, observed(method, x[:5], -x[5:]))
    largest = np.abs(x).max()
    for later in (x, 0.01 * x, x[:1], 10 * x):  # the last is clipped
        np.testing.assert_allclose(
            tensor.rounded(later), symmetric(later, largest), rtol=1e-5, atol=1e-6
        )
    assert np.abs(tensor.rounded(10 * x)).max() <= 1.01 * largest
    np.testing.assert_array_equal(tensor.scale.shape, (1, 1))


def test_a_static_asymmetric_range_is_that_of_calibration():
    format = formats.Format(element=Integer(bits=4), columns=None, rows=None, scale_dtype="float32")
    w, x = layer(3)
    x = jnp.abs(x)
    method = quantized_inputs(format=format, dynamic=False)(METHOD)
    tensor = method.compress(w, observed(method, x))
    step = float(x.max()) / 15
    np.testing.assert_allclose(tensor.rounded(x), np.round(x / step) * step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", ["rtn", "gptq", "stochastic_rounding"])
def test_the_weights_are_those_of_the_method_alone(name, dynamic):
    make = {"rtn": rtn, "gptq": gptq, "stochastic_rounding": stochastic_rounding}[name]
    alone = make(bits=3, group_size=8)
    wrapped = quantized_inputs(format=TENSOR if not dynamic else TOKEN, dynamic=dynamic)(alone)
    w, x = layer(4, n=40)
    key = (jax.random.key(0),) if alone.seeded else ()
    stats = None if alone.observe is None else observed(alone, x)
    seen = None if wrapped.observe is None else observed(wrapped, x)
    expected = alone.compress(w, stats, *key)
    tensor = jax.jit(wrapped.compress)(w, seen, *key)
    np.testing.assert_array_equal(tensor.weight.codes(), expected.codes())
    np.testing.assert_array_equal(tensor.dequantize(), expected.dequantize())
    assert (wrapped.seeded, wrapped.row_block) == (alone.seeded, alone.row_block)
    dense = expected.dequantize()
    np.testing.assert_allclose(wrapped.error(w, dense, seen), alone.error(w, dense, stats))
    if alone.notes is not None:
        assert wrapped.notes(seen) == alone.notes(stats)


def test_static_scales_make_a_method_without_data_look_at_activations():
    assert quantized_inputs(format=TOKEN)(METHOD).observe is None
    assert quantized_inputs(format=TENSOR, dynamic=False)(METHOD).observe is not None


@pytest.mark.parametrize("dynamic", [True, False])
def test_parts_unpacking_and_storage(dynamic):
    w, x = layer(5)
    method = quantized_inputs(format=TENSOR if not dynamic else TOKEN, dynamic=dynamic)(METHOD)
    stats = None if dynamic else observed(method, x)
    tensor = method.compress(w, stats)
    tensor.validate()
    assert tensor.shape == (5, 16)
    assert tensor.storage_bits() == tensor.weight.storage_bits() + (0 if dynamic else 32)
    pieces = tensor.split([2, 3])
    assert [piece.shape for piece in pieces] == [(2, 16), (3, 16)]
    joined = jnp.concatenate([piece.matmul(x) for piece in pieces], 1)
    np.testing.assert_allclose(joined, tensor.matmul(x), rtol=1e-5, atol=1e-5)
    unpacked = tensor.unpacked(jnp.float32)
    assert isinstance(unpacked.weight, DenseTensor) and unpacked.online
    np.testing.assert_array_equal(unpacked.rounded(x), tensor.rounded(x))
    np.testing.assert_allclose(unpacked.matmul(x), tensor.matmul(x), rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_stays_zero():
    w, x = layer(6)
    x = x.at[3].set(0)
    for format in (TOKEN, TENSOR):
        tensor = quantized_inputs(format=format)(METHOD).compress(w, None)
        assert not tensor.rounded(x)[3].any()
        assert not tensor.matmul(jnp.zeros_like(x)).any()


def test_calibration_that_saw_only_zeros_stays_finite():
    w, x = layer(7)
    method = quantized_inputs(format=TENSOR, dynamic=False)(METHOD)
    tensor = method.compress(w, observed(method, 0 * x))
    assert jnp.isfinite(tensor.matmul(x)).all() and not tensor.rounded(0 * x).any()


def test_a_nested_format_keeps_the_divisor_of_calibration():
    """The scales beneath it are fitted to each input, and clipped where they would pass 448."""
    w, x = layer(9)
    format = formats.nvfp4()
    method = quantized_inputs(format=format, dynamic="local")(METHOD)
    tensor = method.compress(w, observed(method, x[:5], -x[5:]))
    np.testing.assert_allclose(tensor.divisor, 448 * 6 / np.abs(x).max(), rtol=1e-6)
    for later in (x, 0.01 * x, x[:1]):
        grid = format.fit(later, divisor=tensor.divisor)
        np.testing.assert_array_equal(tensor.rounded(later), format.nearest(later, grid))
        assert (np.asarray(grid.scale) < 448.1).all()
    assert np.abs(tensor.rounded(0.01 * x) - format.nearest(0.01 * x)).max() > 1e-5
    assert np.abs(tensor.rounded(10 * x)).max() <= 1.01 * np.abs(x).max()


def test_refuses_a_divisor_that_there_is_not():
    with pytest.raises(ValueError, match="dynamic=local is for nested scales"):
        quantized_inputs(format=TOKEN, dynamic="local")
    with pytest.raises(ValueError, match="must be true, false or local"):
        quantized_inputs(format=TOKEN, dynamic="locally")


def test_refuses_static_scales_of_tokens():
    with pytest.raises(ValueError, match="dynamic=false needs rows=null"):
        quantized_inputs(format=TOKEN, dynamic=False)


@pytest.mark.parametrize("search", ["diagonal", "groups"])
def test_refuses_searches_that_look_at_activations(search):
    with pytest.raises(ValueError, match=f"search={search} is for weights"):
        quantized_inputs(format=formats.integer(search=search))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.some(4)
def test_every_choice_of_the_configuration_rounds(name):
    """A few percent of error at most, 32 channels to a scale; static ones store one number, which
    of nested scales is the divisor.
    """
    wrap = hydra.utils.instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    w, x = layer(8, i=64)
    method = wrap(METHOD)
    stats = None if method.observe is None else observed(method, x)
    tensor = method.compress(w, stats)
    error = float(jnp.sum((tensor.rounded(x) - x) ** 2) / jnp.sum(x**2))
    assert 1e-6 < error < (2e-2 if "4" in name.removesuffix("64") else 2e-3)
    fixed = [n for n in (tensor.scale, tensor.divisor) if n is not None]
    assert len(fixed) == (stats is not None) == name.endswith(("tensor", "static"))
    assert method.observe is None or isinstance(stats.inner, type(None) | hessian.HessianStats)
